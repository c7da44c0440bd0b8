"""Looking at a run: its report page, and where in a picture the model looked."""
