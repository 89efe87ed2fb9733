"""What is on disk, and whose it is: nothing is written over or removed that mtr cannot show to be its own.

    lock                      one run at a time in a folder
    marker, manifest          which files of a run, and of a checkpoint, mtr wrote
    checkpoints, publishing   checkpoints and results, put in place complete or not at all
    new_folder                a folder that appears complete or not at all
    problems                  why something could not be written

Imports: files, errors.
"""
