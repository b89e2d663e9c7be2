"""The methods of the structure wing, one a file."""
