"""See the run and steer it: monitor, alarms, KL, live view, report."""
