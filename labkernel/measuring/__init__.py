"""What is measured and how it is told: experiments, the rows of a comparison, figures for Prometheus."""
