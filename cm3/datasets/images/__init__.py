"""Product images: download or folder, validation, storage."""
