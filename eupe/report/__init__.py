"""Pages and figures for people: reports of evaluations, maps of features, statistics of stores."""
