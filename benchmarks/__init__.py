"""Speed of attention on a GPU, ours beside its peers: `make bench`, `make report`."""
