"""Label maps of images: a semantic segmenter, open-vocabulary segmenters, and masks on coarse grids."""
