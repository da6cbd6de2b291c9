"""What is written for people to look at: reports of evaluations, maps of features, statistics of stores."""
