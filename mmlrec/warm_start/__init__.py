"""What a run takes from another one (`init_from`): table rows by the value they stand for, the network by name."""
