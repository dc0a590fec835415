"""What is needed to watch a cluster: the configuration of Prometheus, Grafana, a collector and a trace store."""
