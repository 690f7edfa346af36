def write_report(results, report):
    pass
