"""`lp-dist bench quality`: what each way to sparsity loses, with the same data, tokens, seeds and evaluation. `works`
says what is trained, `methods` and `oneshot` how it is made sparse, `runs` trains and keeps a row for each run, `page`
draws table and plot from the rows.
"""
