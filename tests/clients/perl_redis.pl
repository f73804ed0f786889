# SPDX-License-Identifier: MIT
# Perl's Redis: a database, a pipeline, transactions with WATCH, blocking pops, messages.
use strict;
use warnings;
use Redis;

my $server = "127.0.0.1:$ENV{PORT}";
my $redis = Redis->new(server => $server);
my $other = Redis->new(server => $server);

sub show {
    print join(' ', map { !defined $_ ? 'nothing' : ref $_ ? '[' . join(',', @$_) . ']' : $_ } @_),
        "\n";
}

show($redis->select(4));
show($redis->set('k', 'four'));
show($other->get('k'), $redis->get('k'));
$redis->set('x', 1, sub { });
$redis->incr('x', sub { });
$redis->wait_all_responses;
show($redis->get('x'));
show($redis->watch('x'));
show($other->select(4), $other->set('x', 9));
$redis->multi;
$redis->set('x', 3);
show(scalar $redis->exec);
$redis->multi;
$redis->set('x', 3);
$redis->get('x');
show($redis->exec);
show($redis->blpop('none', 1));
show($redis->rpush('list', 'v'), $redis->blpop('list', 5));
show($redis->eval('return {KEYS[1], ARGV[1]}', 1, 'k', 'v'));
my $subscriber = Redis->new(server => $server);
my @heard;
$subscriber->subscribe('news', sub { push @heard, "$_[1] $_[0]" });
show($redis->publish('news', 'hello'));
$subscriber->wait_for_messages(5) until @heard;
show(@heard);
show(eval { $redis->nosuch('x'); 1 } // $@ =~ /(unknown command)/);
