#if VKP_I_IO
/* ======================================================================================
   >>impl-command   Which commands can share a connection
   ======================================================================================
   One table for clients, whose threads share a connection, and for relays, whose clients do. A
   command is not in it if all that it does is its reply. Arguments are parsed as a server parses
   them. Read-only: any thread.
   Source of the facts: the servers' command tables and t_stream.c, redis 7.0 and valkey 8.1. */

/* What a command does to the connection that carries it. */
typedef enum vkp_i_sharing {
    VKP_I_SHARING_OK = 0, /* nothing: any number of users may share the connection */
    VKP_I_SHARING_OWN, /* changes how the server treats the connection; replies stay as they are */
    VKP_I_SHARING_CHANGES, /* changes what later commands mean, or ends the connection */
    VKP_I_SHARING_BLOCKS   /* keeps all commands behind it waiting */
} vkp_i_sharing;

/* One command, or one subcommand, that is not OK. The rules are sorted by name. */
typedef struct vkp_i_sharing_rule {
    const char *name;
    const char *sub; /* the first argument; NULL: any */
    vkp_i_sharing sharing;
} vkp_i_sharing_rule;

static const vkp_i_sharing_rule vkp_i_sharing_rules[] = {
    {"ASKING", NULL, VKP_I_SHARING_CHANGES},       {"AUTH", NULL, VKP_I_SHARING_CHANGES},
    {"BLMOVE", NULL, VKP_I_SHARING_BLOCKS},        {"BLMPOP", NULL, VKP_I_SHARING_BLOCKS},
    {"BLPOP", NULL, VKP_I_SHARING_BLOCKS},         {"BRPOP", NULL, VKP_I_SHARING_BLOCKS},
    {"BRPOPLPUSH", NULL, VKP_I_SHARING_BLOCKS},    {"BZMPOP", NULL, VKP_I_SHARING_BLOCKS},
    {"BZPOPMAX", NULL, VKP_I_SHARING_BLOCKS},      {"BZPOPMIN", NULL, VKP_I_SHARING_BLOCKS},
    {"CLIENT", "CACHING", VKP_I_SHARING_OWN},      {"CLIENT", "CAPA", VKP_I_SHARING_OWN},
    {"CLIENT", "GETREDIR", VKP_I_SHARING_OWN},     {"CLIENT", "IMPORT-SOURCE", VKP_I_SHARING_OWN},
    {"CLIENT", "NO-EVICT", VKP_I_SHARING_OWN},     {"CLIENT", "NO-TOUCH", VKP_I_SHARING_OWN},
    {"CLIENT", "REPLY", VKP_I_SHARING_CHANGES},    {"CLIENT", "TRACKING", VKP_I_SHARING_OWN},
    {"CLIENT", "TRACKINGINFO", VKP_I_SHARING_OWN}, {"DISCARD", NULL, VKP_I_SHARING_CHANGES},
    {"EXEC", NULL, VKP_I_SHARING_CHANGES},         {"HELLO", NULL, VKP_I_SHARING_CHANGES},
    {"MONITOR", NULL, VKP_I_SHARING_CHANGES},      {"MULTI", NULL, VKP_I_SHARING_CHANGES},
    {"PSUBSCRIBE", NULL, VKP_I_SHARING_CHANGES},   {"PSYNC", NULL, VKP_I_SHARING_CHANGES},
    {"PUNSUBSCRIBE", NULL, VKP_I_SHARING_CHANGES}, {"QUIT", NULL, VKP_I_SHARING_CHANGES},
    {"READONLY", NULL, VKP_I_SHARING_CHANGES},     {"READWRITE", NULL, VKP_I_SHARING_CHANGES},
    {"REPLCONF", NULL, VKP_I_SHARING_CHANGES},     {"RESET", NULL, VKP_I_SHARING_CHANGES},
    {"SCRIPT", "DEBUG", VKP_I_SHARING_CHANGES},    {"SELECT", NULL, VKP_I_SHARING_CHANGES},
    {"SSUBSCRIBE", NULL, VKP_I_SHARING_CHANGES},   {"SUBSCRIBE", NULL, VKP_I_SHARING_CHANGES},
    {"SUNSUBSCRIBE", NULL, VKP_I_SHARING_CHANGES}, {"SYNC", NULL, VKP_I_SHARING_CHANGES},
    {"UNSUBSCRIBE", NULL, VKP_I_SHARING_CHANGES},  {"UNWATCH", NULL, VKP_I_SHARING_CHANGES},
    {"WAIT", NULL, VKP_I_SHARING_BLOCKS},          {"WAITAOF", NULL, VKP_I_SHARING_BLOCKS},
    {"WATCH", NULL, VKP_I_SHARING_CHANGES}};

/* Whether an XREAD or XREADGROUP has the option BLOCK, parsed as a server does: the name of a group
   or of a consumer is no option. Options that are not known may stand before it. */
static bool vkp_i_stream_read_blocks(size_t argc, const vkp_str *argv)
{
    bool group = vkp_i_str_is(argv[0], "XREADGROUP");
    size_t i = 1;
    while (i < argc) {
        if (vkp_i_str_is(argv[i], "BLOCK")) {
            return true;
        }
        if (vkp_i_str_is(argv[i], "STREAMS")) {
            return false;
        }
        i += group && vkp_i_str_is(argv[i], "GROUP") ? 3u
             : vkp_i_str_is(argv[i], "COUNT")        ? 2u
                                                     : 1u;
    }
    return false;
}

/* The order of a name and a text, without regard to case: below, equal to, or above 0. */
static int vkp_i_command_order(vkp_str name, const char *text)
{
    size_t i;
    for (i = 0; i < name.len && text[i] != '\0'; i++) {
        int difference = vkp_i_lower(name.ptr[i]) - vkp_i_lower(text[i]);
        if (difference != 0) {
            return difference;
        }
    }
    return i < name.len ? 1 : text[i] != '\0' ? -1 : 0;
}

/* What the command does to its connection. argc is at least 1. */
static vkp_i_sharing vkp_i_command_get_sharing(size_t argc, const vkp_str *argv)
{
    size_t low = 0;
    size_t high = sizeof vkp_i_sharing_rules / sizeof vkp_i_sharing_rules[0];
    size_t count = high;
    while (low < high) { /* the first rule whose name is not below */
        size_t middle = (low + high) / 2;
        if (vkp_i_command_order(argv[0], vkp_i_sharing_rules[middle].name) > 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (; low < count && vkp_i_str_is(argv[0], vkp_i_sharing_rules[low].name); low++) {
        const vkp_i_sharing_rule *rule = &vkp_i_sharing_rules[low];
        if (rule->sub == NULL || (argc > 1 && vkp_i_str_is(argv[1], rule->sub))) {
            return rule->sharing;
        }
    }
    return (vkp_i_str_is(argv[0], "XREAD") || vkp_i_str_is(argv[0], "XREADGROUP")) &&
                   vkp_i_stream_read_blocks(argc, argv)
               ? VKP_I_SHARING_BLOCKS
               : VKP_I_SHARING_OK;
}

/* Whether servers accept the name of a connection (SETNAME): printable, without blanks. */
static bool vkp_i_is_client_name(vkp_str name)
{
    size_t i;
    for (i = 0; i < name.len; i++) {
        if (name.ptr[i] < '!' || name.ptr[i] > '~') {
            return false;
        }
    }
    return true;
}

/* Whether the command waits for the writes of its connection to be elsewhere. */
static bool vkp_i_command_is_wait(size_t argc, const vkp_str *argv)
{
    return argc > 0 && (vkp_i_str_is(argv[0], "WAIT") || vkp_i_str_is(argv[0], "WAITAOF"));
}

/* What precedes such a command on a connection that did not make the writes: a message, which goes
   to the replicas too, behind all that the server did before.                                 */
static const char vkp_i_catch_up[] = "*3\r\n$7\r\nPUBLISH\r\n$16\r\nvalkey-push:wait\r\n$0\r\n\r\n";

/* The commands whose effect is their reply, upper case, sorted. What is not in the list may do
   something to its connection: commands of modules, and of servers that are younger than this. */
static const char *const vkp_i_harmless[] = {"ACL",
                                             "APPEND",
                                             "BGREWRITEAOF",
                                             "BGSAVE",
                                             "BITCOUNT",
                                             "BITFIELD",
                                             "BITFIELD_RO",
                                             "BITOP",
                                             "BITPOS",
                                             "CLIENT",
                                             "CLUSTER",
                                             "COMMAND",
                                             "COMMANDLOG",
                                             "CONFIG",
                                             "COPY",
                                             "DBSIZE",
                                             "DECR",
                                             "DECRBY",
                                             "DEL",
                                             "DELEX",
                                             "DELIFEQ",
                                             "DIGEST",
                                             "DUMP",
                                             "ECHO",
                                             "EVAL",
                                             "EVAL_RO",
                                             "EVALSHA",
                                             "EVALSHA_RO",
                                             "EXISTS",
                                             "EXPIRE",
                                             "EXPIREAT",
                                             "EXPIRETIME",
                                             "FCALL",
                                             "FCALL_RO",
                                             "FLUSHALL",
                                             "FLUSHDB",
                                             "FUNCTION",
                                             "GEOADD",
                                             "GEODIST",
                                             "GEOHASH",
                                             "GEOPOS",
                                             "GEORADIUS",
                                             "GEORADIUS_RO",
                                             "GEORADIUSBYMEMBER",
                                             "GEORADIUSBYMEMBER_RO",
                                             "GEOSEARCH",
                                             "GEOSEARCHSTORE",
                                             "GET",
                                             "GETBIT",
                                             "GETDEL",
                                             "GETEX",
                                             "GETRANGE",
                                             "GETSET",
                                             "HDEL",
                                             "HEXISTS",
                                             "HEXPIRE",
                                             "HEXPIREAT",
                                             "HEXPIRETIME",
                                             "HGET",
                                             "HGETALL",
                                             "HGETDEL",
                                             "HGETEX",
                                             "HINCRBY",
                                             "HINCRBYFLOAT",
                                             "HKEYS",
                                             "HLEN",
                                             "HMGET",
                                             "HMSET",
                                             "HPERSIST",
                                             "HPEXPIRE",
                                             "HPEXPIREAT",
                                             "HPEXPIRETIME",
                                             "HPTTL",
                                             "HRANDFIELD",
                                             "HSCAN",
                                             "HSET",
                                             "HSETEX",
                                             "HSETNX",
                                             "HSTRLEN",
                                             "HTTL",
                                             "HVALS",
                                             "INCR",
                                             "INCRBY",
                                             "INCRBYFLOAT",
                                             "INFO",
                                             "KEYS",
                                             "LASTSAVE",
                                             "LATENCY",
                                             "LCS",
                                             "LINDEX",
                                             "LINSERT",
                                             "LLEN",
                                             "LMOVE",
                                             "LMPOP",
                                             "LOLWUT",
                                             "LPOP",
                                             "LPOS",
                                             "LPUSH",
                                             "LPUSHX",
                                             "LRANGE",
                                             "LREM",
                                             "LSET",
                                             "LTRIM",
                                             "MEMORY",
                                             "MGET",
                                             "MOVE",
                                             "MSET",
                                             "MSETEX",
                                             "MSETNX",
                                             "OBJECT",
                                             "PERSIST",
                                             "PEXPIRE",
                                             "PEXPIREAT",
                                             "PEXPIRETIME",
                                             "PFADD",
                                             "PFCOUNT",
                                             "PFMERGE",
                                             "PING",
                                             "PSETEX",
                                             "PTTL",
                                             "PUBLISH",
                                             "PUBSUB",
                                             "RANDOMKEY",
                                             "RENAME",
                                             "RENAMENX",
                                             "RESTORE",
                                             "ROLE",
                                             "RPOP",
                                             "RPOPLPUSH",
                                             "RPUSH",
                                             "RPUSHX",
                                             "SADD",
                                             "SAVE",
                                             "SCAN",
                                             "SCARD",
                                             "SCRIPT",
                                             "SDIFF",
                                             "SDIFFSTORE",
                                             "SET",
                                             "SETBIT",
                                             "SETEX",
                                             "SETNX",
                                             "SETRANGE",
                                             "SINTER",
                                             "SINTERCARD",
                                             "SINTERSTORE",
                                             "SISMEMBER",
                                             "SLOWLOG",
                                             "SMEMBERS",
                                             "SMISMEMBER",
                                             "SMOVE",
                                             "SORT",
                                             "SORT_RO",
                                             "SPOP",
                                             "SPUBLISH",
                                             "SRANDMEMBER",
                                             "SREM",
                                             "SSCAN",
                                             "STRLEN",
                                             "SUBSTR",
                                             "SUNION",
                                             "SUNIONSTORE",
                                             "SWAPDB",
                                             "TIME",
                                             "TOUCH",
                                             "TTL",
                                             "TYPE",
                                             "UNLINK",
                                             "XACK",
                                             "XACKDEL",
                                             "XADD",
                                             "XAUTOCLAIM",
                                             "XCLAIM",
                                             "XDEL",
                                             "XDELEX",
                                             "XGROUP",
                                             "XINFO",
                                             "XLEN",
                                             "XPENDING",
                                             "XRANGE",
                                             "XREAD",
                                             "XREADGROUP",
                                             "XREVRANGE",
                                             "XSETID",
                                             "XTRIM",
                                             "ZADD",
                                             "ZCARD",
                                             "ZCOUNT",
                                             "ZDIFF",
                                             "ZDIFFSTORE",
                                             "ZINCRBY",
                                             "ZINTER",
                                             "ZINTERCARD",
                                             "ZINTERSTORE",
                                             "ZLEXCOUNT",
                                             "ZMPOP",
                                             "ZMSCORE",
                                             "ZPOPMAX",
                                             "ZPOPMIN",
                                             "ZRANDMEMBER",
                                             "ZRANGE",
                                             "ZRANGEBYLEX",
                                             "ZRANGEBYSCORE",
                                             "ZRANGESTORE",
                                             "ZRANK",
                                             "ZREM",
                                             "ZREMRANGEBYLEX",
                                             "ZREMRANGEBYRANK",
                                             "ZREMRANGEBYSCORE",
                                             "ZREVRANGE",
                                             "ZREVRANGEBYLEX",
                                             "ZREVRANGEBYSCORE",
                                             "ZREVRANK",
                                             "ZSCAN",
                                             "ZSCORE",
                                             "ZUNION",
                                             "ZUNIONSTORE"};

/* Words that make a harmless command one that is of use only if it does not wait behind others. */
static const char *const vkp_i_urgent[][2] = {
    {"CLIENT", "UNPAUSE"}, {"FUNCTION", "KILL"}, {"SCRIPT", "KILL"}};

/* Whether the command may go over a connection that others use too. argc is at least 1. */
static bool vkp_i_command_is_harmless(size_t argc, const vkp_str *argv)
{
    size_t low = 0;
    size_t high = sizeof vkp_i_harmless / sizeof vkp_i_harmless[0];
    size_t i;
    for (i = 0; i < sizeof vkp_i_urgent / sizeof vkp_i_urgent[0] && argc > 1; i++) {
        if (vkp_i_str_is(argv[0], vkp_i_urgent[i][0]) &&
            vkp_i_str_is(argv[1], vkp_i_urgent[i][1])) {
            return false;
        }
    }
    if (vkp_i_command_get_sharing(argc, argv) != VKP_I_SHARING_OK) {
        return false;
    }
    while (low < high) {
        size_t middle = (low + high) / 2;
        int order = vkp_i_command_order(argv[0], vkp_i_harmless[middle]);
        if (order == 0) {
            return true;
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return false;
}

#endif /* VKP_I_IO */
