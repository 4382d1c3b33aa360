"""
See a run and steer it.

Modules, in the order in which they build on each other:

- `readings`: how ill a run looks by one sign, from its logs; `task_readings`: how ill its worst task looks; `alarms`:
  thresholds over readings, and what they advise.
- `secrets`: what a record must not hold; `record`: the files of a run, written and read; `chosen`: which options
  somebody chose.
- `actions`: what an alarm can do; `effect`: whether updates change weights; `monitor`: the callback that brings these
  together; `kl`: adaptive beta, which needs no alarm.
- `paired`: gains with their noise, pass@k; `held_out`: answers to held-out prompts and their scores; `measures`: which
  metrics, under which names; `tables`: for trackers; `evaluation`: the callback that brings these together.
- `tasks`: the metrics of each task, where a run has several.
- `report`: a run as a page of HTML; `live`: a run in the terminal.

To add an alarm, write a measure in `readings` (or take one), give it a line in `RULES` and one in `ADVICE` of `alarms`,
name it in `ALARMS` of the configuration, and add its illness to `recipes/studies/alarm_rates.py`, which says how often
the alarm is wrong. To add an action, subclass `Action` in `actions`, and name the class in `CLASSES` there and in
`ACTIONS` of the configuration.

Nothing is imported here: the report starts without TRL.
"""
