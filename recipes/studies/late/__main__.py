"""Both parts of the study of late rollouts: tune, run what is missing, store it, and print the tables.

python -m recipes.studies.late [--report]
"""

from recipes.studies.late import late_rollouts, several_updates

if __name__ == "__main__":
    late_rollouts.main(late_rollouts.STUDY, late_rollouts.STORED, __doc__)
    late_rollouts.main(several_updates.STUDY, several_updates.STORED, __doc__)
