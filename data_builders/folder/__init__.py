"""Any directory of images of the user's own."""
