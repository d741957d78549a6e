"""The one loop: feed -> forward and backward -> clip -> step -> record, for every kind of training."""
