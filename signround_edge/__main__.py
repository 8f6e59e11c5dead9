"""`python -m signround_edge`: the command line."""

from signround_edge.cli import main

if __name__ == "__main__":
    main(prog_name="signround-edge")
