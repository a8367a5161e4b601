"""What counts as an attention call, and how each kind of call is read and put back."""
