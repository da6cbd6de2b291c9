"""Networks: encoders of any architecture, the proxy, weights files into models, principal components."""
