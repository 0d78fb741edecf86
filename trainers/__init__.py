from trainers.deferred import defer

defer()
