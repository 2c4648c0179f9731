"""Looking at and storing images and videos: what writers, rewards and commands share. Imports no torch."""
