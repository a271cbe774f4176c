"""Generate images from the starter corpus: from one prompt, or from many into one contact sheet."""
