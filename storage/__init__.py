"""The images: store, state images and catalogue. A leaf: it knows nothing of TPMs or rings."""
