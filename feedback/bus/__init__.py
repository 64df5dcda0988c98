"""The log between the processes: one contract, kept by SQLite on one machine and by Kafka."""
