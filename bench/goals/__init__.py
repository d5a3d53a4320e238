"""What a run is trained and tested for, one file per kind of task: head, loss, score, what is kept of the test part."""
