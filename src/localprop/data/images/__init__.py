"""Images: files, folders and pixels in memory."""
