"""What runs the passes over the rows: this machine's cores, or Spark. The same folder, to the byte."""
