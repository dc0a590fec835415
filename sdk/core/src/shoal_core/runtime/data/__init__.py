"""The user's data: values as bytes, where these lie, and how they are written, read and moved."""
