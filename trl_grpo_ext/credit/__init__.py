"""From rewards to advantages: groups, turns, a critic."""
