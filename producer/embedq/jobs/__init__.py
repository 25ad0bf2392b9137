"""One job: batches out within a window, commits in, lost batches recovered."""
