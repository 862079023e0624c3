"""What people run: the command, projects and runs, the demonstration, the report and the explorer."""
