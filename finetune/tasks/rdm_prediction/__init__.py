"""Predict the dissimilarity of brain responses to two images, over whole matrices of images."""
