"""What a schedule needs of a step beside the loss and its gradient."""
