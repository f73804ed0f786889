# SPDX-License-Identifier: MIT
# redis-rb: a database, pipelines, transactions with WATCH, blocking pops, messages.
require 'redis'

port = ENV.fetch('PORT').to_i
redis = Redis.new(port: port, db: 3)
other = Redis.new(port: port)
p redis.set('k', 'three'), other.get('k'), redis.get('k')
p(redis.pipelined { |pipe| pipe.set('x', 1); pipe.incr('x'); pipe.get('x') })
p(redis.multi { |pipe| pipe.set('x', 1); pipe.incr('x') })
result = redis.watch('x') do
  Redis.new(port: port, db: 3).set('x', 9)
  redis.multi { |pipe| pipe.set('x', 3) }
end
p result
p redis.blpop('none', timeout: 1)
Thread.new { sleep 0.2; Redis.new(port: port, db: 3).rpush('list', 'v') }
p redis.blpop('list', timeout: 5)
p redis.mapped_hmset('hash', 'a' => 1, 'b' => 2), redis.hgetall('hash')
p redis.eval('return {KEYS[1], ARGV[1]}', keys: ['k'], argv: ['v'])
subscriber = Redis.new(port: port)
subscriber.subscribe('news') do |on|
  on.subscribe do |channel, count|
    p [channel, count]
    other.publish('news', 'hello')
  end
  on.message do |channel, text|
    p [channel, text]
    subscriber.unsubscribe('news')
  end
  on.unsubscribe { |channel, count| p [channel, count] }
end
begin
  redis.call('NOSUCH')
rescue Redis::CommandError => e
  puts e.message
end
