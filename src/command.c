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
   or of a consumer is no option. */
static bool vkp_i_stream_read_blocks(size_t argc, const vkp_str *argv)
{
    bool group = vkp_i_str_is(argv[0], "XREADGROUP");
    size_t i = 1;
    while (i < argc) {
        if (vkp_i_str_is(argv[i], "BLOCK")) {
            return true;
        }
        if (vkp_i_str_is(argv[i], "COUNT")) {
            i += 2;
        } else if (group && vkp_i_str_is(argv[i], "GROUP")) {
            i += 3;
        } else if (vkp_i_str_is(argv[i], "NOACK")) {
            i++;
        } else {
            return false; /* STREAMS, or an error of syntax */
        }
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

#endif /* VKP_I_IO */
