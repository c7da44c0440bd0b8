"""Looking at a run: its report page, and where in a picture the model looked."""

PAGE = "report.html"  # in a run's folder; of other data in the folder of their evaluation
