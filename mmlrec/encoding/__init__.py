"""The frozen encoder: raw cells to canonical values to ids and numbers; the same in preprocessing, in Python and in exports."""
