from app.cli import main

if __name__ == "__main__":  # processes of `clasp dataset` import this module, too
    main()
