"""Language models behind one seam: loss and generation given image tokens."""
