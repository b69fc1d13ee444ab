"""Graph to facts: observers, outliers, sensitivity, measured cost; never edits the graph."""
