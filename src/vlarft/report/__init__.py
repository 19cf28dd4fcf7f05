"""Write one HTML page about runs: what was trained, curves, tables with intervals, films. Needs matplotlib, pillow,
jinja2.

    python -m vlarft.report runs/demo                              writes runs/demo/report.html
    python -m vlarft.report runs/rft runs/eval --out report.html

A run is a folder that a stage script or demo.py wrote; runs one or two folders below it are taken along. Reads
config.json, log.jsonl, results.json, summary.json, stages.json, the header of model.safetensors, pictures, films and
rollouts.npz. The page holds all of its pictures, so that it can be sent as one file, and loads nothing. Statistics are
those that the scripts wrote; none is computed here.
"""
