/* Models of ref-counted sockets: up to three threads on one registry (or two, see PROCESSES) and a
   disk in memory. Paths: 0 and 1 share a chain of the registry's map, however large it grows; 2
   does not. A thread begins with the handles that its first letters name, has a weak handle of path
   0, and gives everything back at its end.

   a begins with a handle of path 0     b of path 1
   c C t get_or_create, path 0, 1, 2    e E get_existing, path 0, 1
   u U v unref a handle of path 0, 1, 2 r ref one of path 0
   d downgrade a handle of path 0: the thread's weak handle from then on      w upgrade
   n bind a socket to path 0 and register_new     m remove what is at path 0, bind a socket there
   k cleanup_all     g get_count, is_active, get_stats     l a round of the loop
   x close the loop     z remove the file of path 0

   What is checked: whoever holds a handle finds the file that he got it with, somebody listening
   and the lock held, until his unref begins; the same for all holders of a path. While nobody is
   inside a call, each path that nobody holds has neither file nor lock file, no ended slot waits,
   and the registry counts the rest. At the end there is no file, descriptor, slot or memory left.

   This file has a private copy of the library, with its sockets, which the other models leave out.
   It looks into the registry, uninstrumented, where only the end of a call says what must be.   */
#define VKP_IMPLEMENTATION
#define VKP_STATIC
#define VKP_I_ATOMICS_FILE "model_atomics.h"
#include "valkey_push.h"

#include "disk.h"
#include "environment.h"
#include "families.h"

#define ACTORS 3
#define MAIN ACTORS /* the caller of before and after, as one */
#define PATHS 3
#define HANDLES 6 /* of one thread */
#define LINGER_MS 1
#define ROUND_NS ((uint64_t)LINGER_MS * 1500000)
#define NEVER UINT_MAX
#define UNKNOWN UINT_MAX

#define FRESH 1u     /* no slot was used before */
#define NARROW 2u    /* the map begins with one bucket: the second socket has it grow */
#define ORPHAN 4u    /* the threads have the registry's only references */
#define PROCESSES 8u /* odd threads have a registry of their own, on the same disk */
#define LINGERS 16u
#define CLOSES 32u  /* at last the loop is closed, before those that linger have had their time */
#define FULL 64u    /* the socket of path 0 can have two references more, while others keep it */
#define CHECKS 128u /* the loop looks after the files, and binds again what is gone */

struct socket_scenario {
    const char *actors[ACTORS];
    uint32_t flags;
    unsigned stop; /* thread 0's n-th call of the system ends when the other threads have */
};

struct handle {
    vkp_socket *sock; /* NULL: none */
    unsigned path;
    unsigned file; /* UNKNOWN: that of an earlier or later socket of the path may stand there */
    unsigned era;  /* as long as this is now.era the socket must be live; NEVER: it need not */
};

struct actor {
    vkp_registry *registry;
    struct handle handles[HANDLES];
    vkp_weak_socket weak;
    unsigned weak_file;
};

struct place {
    const char *name;
    const char *lock;
    unsigned acquiring; /* calls under way that may give a handle, */
    unsigned giving;    /* that give one back */
    unsigned dropped;   /* how often the last handle was given back */
    unsigned over;      /* files up to this one are those of ended sockets */
};

static struct {
    vkp_env env;
    vkp_sys sys;
    vkp_loop *loop;
    uint32_t woken;
    vkp_registry *registries[2];
    struct actor actors[ACTORS + 1];
    struct place places[PATHS];
    unsigned inside; /* calls under way, */
    unsigned calls;  /* begun */
    unsigned era;    /* how often something began that ends sockets in spite of their handles, */
    unsigned ending; /* that goes on */
    unsigned movers; /* how often the program bound a socket itself, */
    unsigned moving; /* and has not yet handed it over */
    unsigned living; /* threads */
    uint64_t others; /* references to path 0 that nobody has */
    int foreign;     /* the descriptor of one that moved in; -1: none */
} now;

static char names[PATHS][2][24];

static const struct socket_scenario *scenario(void)
{
    return (const struct socket_scenario *)(uintptr_t)model_now->scenario[0];
}

static bool is(uint32_t flag)
{
    return (scenario()->flags & flag) != 0;
}

static bool has(const char *calls)
{
    unsigned i;
    for (i = 0; i < ACTORS && scenario()->actors[i] != NULL; i++) {
        if (strpbrk(scenario()->actors[i], calls) != NULL) {
            return true;
        }
    }
    return false;
}

/* ---- the loop's backend ---- */

static vkp_status backend_open(const vkp_backend_host *host, void **state)
{
    (void)host;
    *state = &now;
    return VKP_OK;
}

static void backend_close(void *state)
{
    (void)state;
}

static vkp_status backend_wait(void *state, uint64_t deadline_ns, vkp_event *out, size_t capacity,
                               size_t *count)
{
    (void)state;
    (void)out;
    (void)capacity;
    *count = 0;
    (void)model_sleep((uintptr_t)&now.woken, 0, deadline_ns);
    now.woken = 0;
    return VKP_OK;
}

static void backend_wake(void *state)
{
    (void)state;
    now.woken = 1;
    model_wake((uintptr_t)&now.woken);
}

static const vkp_backend backend = {.abi = VKP_BACKEND_ABI,
                                    .name = "model",
                                    .open = backend_open,
                                    .close = backend_close,
                                    .wait = backend_wait,
                                    .wake = backend_wake};

/* ---- what must be ---- */

static bool is_live(unsigned path)
{
    return disk_answers(now.places[path].name) && disk_is_locked(now.places[path].lock);
}

static bool must_live(const struct handle *handle)
{
    return handle->sock != NULL && handle->era == now.era;
}

/* The handles of a path, in a registry or in all, whose socket must be live. */
static unsigned holders(unsigned path, const vkp_registry *registry)
{
    unsigned count = 0;
    unsigned i;
    unsigned k;
    for (i = 0; i <= MAIN; i++) {
        for (k = 0; k < HANDLES; k++) {
            const struct handle *each = &now.actors[i].handles[k];
            count += must_live(each) && each->path == path &&
                     (registry == NULL || now.actors[i].registry == registry);
        }
    }
    return count;
}

/* Whether there is any handle of it. */
static bool is_held(unsigned path, const vkp_registry *registry)
{
    bool held = false;
    unsigned i;
    unsigned k;
    for (i = 0; i <= MAIN; i++) {
        for (k = 0; k < HANDLES; k++) {
            const struct handle *each = &now.actors[i].handles[k];
            held = held || (each->sock != NULL && each->path == path &&
                            (registry == NULL || now.actors[i].registry == registry));
        }
    }
    return held;
}

#define UNWATCHED __attribute__((noinline, no_sanitize("thread")))

/* Nobody is inside: the registry has no work left, and knows what it has to know. */
UNWATCHED static void check_registry(const vkp_registry *registry, unsigned least, unsigned most)
{
    const vkp_socket *sock;
    size_t slots = 0;
    size_t spare = 0;
    MODEL_CHECK(registry->held == 0);
    MODEL_CHECK(registry->ended_slots == NULL); /* a disposal was lost */
    MODEL_CHECK(registry->sockets.count >= least && registry->sockets.count <= most);
    for (sock = registry->all; sock != NULL; sock = sock->all) {
        slots++;
        /* The others belong to live sockets, or to ended ones of which there are handles. */
        spare += (sock->word & (VKP_I_REFS | VKP_I_CLEANUP)) == 0 && sock->on_disk == 0;
    }
    for (sock = registry->spare; sock != NULL; sock = sock->link) {
        MODEL_CHECK(spare > 0); /* linked twice, or while in use */
        MODEL_CHECK((sock->word & 0xffffffffu) == 0);
        spare--;
        slots--;
    }
    MODEL_CHECK(spare == 0); /* a slot was lost */
    MODEL_CHECK(slots >= registry->sockets.count);
}

static void check_quiet(void)
{
    unsigned path;
    unsigned i;
    for (path = 0; path < PATHS; path++) {
        const struct place *place = &now.places[path];
        if (holders(path, NULL) > 0) {
            MODEL_CHECK(is_live(path));
        } else if (!is(LINGERS) && !is_held(path, NULL)) {
            MODEL_CHECK(disk_file(place->name) == 0 || (path == 0 && now.foreign >= 0));
            MODEL_CHECK(disk_file(place->lock) == 0);
        }
    }
    for (i = 0; i < 2 && now.registries[i] != NULL && !is(ORPHAN); i++) {
        unsigned least = 0;
        unsigned most = 0;
        for (path = 0; path < PATHS; path++) {
            least += holders(path, now.registries[i]) > 0;
            most += is(LINGERS) || is_held(path, now.registries[i]);
        }
        check_registry(now.registries[i], least, most);
    }
}

static void begin(void)
{
    now.inside++;
    now.calls++;
}

static void end(void)
{
    now.inside--;
    if (now.inside == 0) {
        check_quiet();
    }
}

static void on_unlink(const char *name, unsigned file)
{
    unsigned path;
    unsigned i;
    unsigned k;
    for (path = 0; path < PATHS; path++) {
        const struct place *place = &now.places[path];
        if (strcmp(name, place->lock) == 0) { /* is the last to go */
            MODEL_CHECK(disk_is_locked(name));
            MODEL_CHECK(disk_file(place->name) == 0 || now.movers > 0);
        }
    }
    for (i = 0; i <= MAIN; i++) {
        for (k = 0; k < HANDLES; k++) {
            const struct handle *each = &now.actors[i].handles[k];
            MODEL_CHECK(!must_live(each) || each->file != file);
        }
    }
}

/* ---- handles ---- */

static struct handle *find_handle(struct actor *self, unsigned path)
{
    unsigned i;
    for (i = HANDLES; i-- > 0;) {
        if (self->handles[i].sock != NULL && self->handles[i].path == path) {
            return &self->handles[i];
        }
    }
    return NULL;
}

/* `era`: now.era when the call began, NEVER when something was about to end sockets. */
static void keep(struct actor *self, unsigned path, vkp_socket *sock, unsigned era)
{
    struct handle *fresh = self->handles;
    const char *name = now.places[path].name;
    unsigned i;
    unsigned k;
    MODEL_CHECK(memcmp(vkp_socket_get_path(sock), name, strlen(name) + 1) == 0);
    while (fresh->sock != NULL) {
        fresh++;
        MODEL_CHECK(fresh < self->handles + HANDLES);
    }
    *fresh = (struct handle){sock, path, UNKNOWN, era};
    if (!must_live(fresh)) {
        return;
    }
    fresh->file = disk_file(name);
    MODEL_CHECK(is_live(path));
    for (i = 0; i <= MAIN; i++) {
        for (k = 0; k < HANDLES; k++) {
            const struct handle *each = &now.actors[i].handles[k];
            if (must_live(each) && each->path == path) {
                MODEL_CHECK(each->file == fresh->file && each->sock == sock);
            }
        }
    }
}

static unsigned era(void)
{
    return now.ending > 0 ? NEVER : now.era;
}

/* What has returned, and left no handle, leaves nothing that a weak handle could bring back. */
static void settle(unsigned path)
{
    struct place *place = &now.places[path];
    if (place->acquiring == 0 && place->giving == 0 && !is_held(path, NULL) && !is(LINGERS)) {
        place->over = disk_newest_file();
    }
}

static void give(struct actor *self, unsigned path)
{
    struct handle *handle = find_handle(self, path);
    struct place *place = &now.places[path];
    vkp_socket *sock = handle->sock;
    begin();
    place->giving++;
    if (must_live(handle)) {
        MODEL_CHECK(is_live(path) && disk_file(place->name) == handle->file);
        place->dropped += holders(path, NULL) == 1;
    }
    handle->sock = NULL;
    vkp_socket_unref(sock);
    place->giving--;
    settle(path);
    end();
}

/* ---- calls ---- */

static void get(struct actor *self, unsigned path, bool create)
{
    struct place *place = &now.places[path];
    bool held = holders(path, self->registry) > 0;
    unsigned dropped = place->dropped;
    unsigned movers = now.movers - now.moving;
    unsigned since = era();
    vkp_socket *sock = NULL;
    vkp_status status;
    begin();
    place->acquiring++;
    status = create ? vkp_socket_open(self->registry, vkp_str_of(place->name), &sock)
                    : vkp_socket_find(self->registry, vkp_str_of(place->name), &sock);
    model_note("%s: %s", create ? "get_or_create" : "get_existing", vkp_status_str(status));
    place->acquiring--;
    if (status == VKP_OK) {
        keep(self, path, sock, since);
    } else if (status == VKP_ERR_IN_USE) {
        MODEL_CHECK(create && (now.movers > movers || is(PROCESSES)));
    } else if (status == VKP_ERR_SYS) {
        MODEL_CHECK(create && has("z")); /* its file went away at once */
    } else {
        MODEL_CHECK(status == VKP_ERR_NOT_FOUND && !create);
        MODEL_CHECK(!held || place->dropped > dropped || since != now.era);
        MODEL_CHECK(!is(LINGERS) || has("klx"));
    }
    settle(path);
    end();
}

static void upgrade(struct actor *self)
{
    struct place *place = &now.places[0];
    bool over = self->weak_file <= place->over;
    bool held = false;
    unsigned dropped = place->dropped;
    unsigned since = era();
    vkp_socket *sock = NULL;
    vkp_status status;
    unsigned i;
    unsigned k;
    for (i = 0; i <= MAIN; i++) {
        for (k = 0; k < HANDLES; k++) {
            const struct handle *each = &now.actors[i].handles[k];
            held = held || (must_live(each) && each->path == 0 && each->file == self->weak_file);
        }
    }
    begin();
    place->acquiring++;
    status = vkp_socket_upgrade(&self->weak, &sock);
    model_note("upgrade: %s", vkp_status_str(status));
    place->acquiring--;
    if (status == VKP_OK) {
        keep(self, 0, sock, since);
        MODEL_CHECK(!over);
        MODEL_CHECK(since != now.era || self->weak_file == UNKNOWN || now.foreign >= 0 ||
                    disk_file(place->name) == self->weak_file);
    } else {
        MODEL_CHECK(status == VKP_ERR_NOT_FOUND || (status == VKP_ERR_LIMIT && is(FULL)));
        MODEL_CHECK(status == VKP_ERR_LIMIT || !held || place->dropped > dropped ||
                    since != now.era);
        MODEL_CHECK(!is(LINGERS) || has("klx"));
    }
    settle(0);
    end();
}

static void downgrade(struct actor *self)
{
    const struct handle *handle = find_handle(self, 0);
    begin();
    self->weak = vkp_socket_downgrade(handle->sock);
    self->weak_file = handle->file;
    end();
}

static void ref(struct actor *self)
{
    const struct handle *handle = find_handle(self, 0);
    vkp_socket *sock;
    begin();
    sock = vkp_socket_ref(handle->sock);
    MODEL_CHECK(sock == handle->sock || (sock == NULL && is(FULL)));
    MODEL_CHECK(vkp_socket_is_active(handle->sock) || handle->era != now.era);
    if (sock != NULL) {
        keep(self, 0, sock, handle->era);
    }
    end();
}

static void register_new(struct actor *self)
{
    const struct place *place = &now.places[0];
    unsigned since = era();
    vkp_socket *sock = NULL;
    vkp_status status;
    int fd;
    begin();
    fd = disk_move_in(place->name);
    if (fd >= 0) {
        now.movers++;
        now.moving++;
        disk_hand_over(fd);
        now.places[0].acquiring++;
        status = vkp_socket_adopt(self->registry, vkp_str_of(place->name), fd, &sock);
        model_note("register_new: %s", vkp_status_str(status));
        now.places[0].acquiring--;
        now.moving--;
        MODEL_CHECK(status == VKP_OK);
        keep(self, 0, sock, since);
        settle(0);
    }
    end();
}

/* Ends no handle, but its file. */
static void move_in(void)
{
    const struct place *place = &now.places[0];
    begin();
    now.era++;
    now.movers++; /* and does not hand it over */
    now.moving++;
    disk_remove(place->name);
    now.foreign = disk_move_in(place->name);
    end();
}

static void clean_up(struct actor *self)
{
    unsigned calls;
    bool alone;
    unsigned i;
    begin();
    now.era++;
    now.ending++;
    calls = now.calls;
    alone = now.inside == 1;
    model_note("cleanup_all: %zu", vkp_registry_cleanup_all(self->registry));
    now.ending--;
    if (alone && now.calls == calls) {
        for (i = 0; i < PATHS; i++) {
            MODEL_CHECK(disk_file(now.places[i].name) == 0 || (i == 0 && now.foreign >= 0));
            MODEL_CHECK(disk_file(now.places[i].lock) == 0);
        }
        for (i = 0; i < HANDLES; i++) {
            MODEL_CHECK(self->handles[i].sock == NULL ||
                        !vkp_socket_is_active(self->handles[i].sock));
        }
    }
    end();
}

static void look(struct actor *self)
{
    vkp_registry_stats stats;
    unsigned since;
    bool held;
    begin();
    MODEL_CHECK(vkp_registry_get_count(self->registry) <= PATHS);
    held = holders(0, self->registry) > 0;
    since = era();
    if (!vkp_registry_is_active(self->registry, vkp_str_of(now.places[0].name))) {
        MODEL_CHECK(!held || since != now.era || now.places[0].dropped > 0);
    }
    vkp_registry_get_stats(self->registry, &stats);
    MODEL_CHECK(stats.live == stats.created - stats.ended);
    MODEL_CHECK(stats.unlink_failures == 0 && stats.taken_over == 0);
    end();
}

static void call(struct actor *self, char what)
{
    static const char creates[] = "cCt";
    static const char gives[] = "uUv";
    const char *found;
    vkp_status status;
    if (strchr("urd", what) != NULL && find_handle(self, 0) == NULL) {
        return; /* upgrade or get_existing did not give one */
    }
    if ((found = strchr(creates, what)) != NULL) {
        get(self, (unsigned)(found - creates), true);
    } else if ((found = strchr(gives, what)) != NULL) {
        if (find_handle(self, (unsigned)(found - gives)) != NULL) {
            give(self, (unsigned)(found - gives));
        }
    } else if (what == 'e' || what == 'E') {
        get(self, what == 'E', false);
    } else if (what == 'r') {
        ref(self);
    } else if (what == 'd') {
        downgrade(self);
    } else if (what == 'w') {
        upgrade(self);
    } else if (what == 'n') {
        register_new(self);
    } else if (what == 'm') {
        move_in();
    } else if (what == 'k') {
        clean_up(self);
    } else if (what == 'g') {
        look(self);
    } else if (what == 'l') {
        begin();
        status = vkp_loop_run_once(now.loop, model_clock_ns() + ROUND_NS);
        MODEL_CHECK(status == VKP_OK);
        end();
    } else if (what == 'z') {
        now.era++;
        now.ending++; /* from now on it is there or not */
        disk_remove(now.places[0].name);
    } else {
        MODEL_CHECK(what == 'x');
        begin();
        vkp_loop_close(now.loop);
        end();
    }
}

/* ---- the scenario ---- */

static void on_event(void *user, vkp_socket *sock, vkp_socket_event event, vkp_status status)
{
    const char *name = now.places[0].name;
    MODEL_CHECK(user == now.places && status == VKP_OK);
    MODEL_CHECK(event == VKP_SOCKET_LOST || event == VKP_SOCKET_REBOUND);
    MODEL_CHECK(memcmp(vkp_socket_get_path(sock), name, strlen(name) + 1) == 0);
}

static void open_registry(unsigned which)
{
    vkp_registry_config config = VKP_ZERO;
    vkp_status status;
    config.folder = vkp_str_of("/");
    config.env = &now.env;
    config.loop = now.loop;
    config.linger_ms = is(LINGERS) ? LINGER_MS : 0;
    config.check_ms = is(CHECKS) ? LINGER_MS : 0;
    config.rebind = true;
    config.on_event = on_event;
    config.user = now.places;
    status = vkp_registry_open(&config, &now.registries[which]);
    MODEL_CHECK(status == VKP_OK);
    if (is(NARROW)) {
        MODEL_CHECK(vkp_i_map_resize(&now.registries[which]->sockets, 1));
    }
}

static void open_loop(void)
{
    vkp_loop_config config = VKP_ZERO;
    vkp_status status;
    config.backend = &backend;
    config.env = &now.env;
    config.events_per_wait = 1;
    status = vkp_loop_open(&config, &now.loop);
    MODEL_CHECK(status == VKP_OK);
}

static void hand_out(struct actor *self, unsigned path)
{
    vkp_socket *sock = NULL;
    vkp_status status = vkp_socket_open(self->registry, vkp_str_of(now.places[path].name), &sock);
    MODEL_CHECK(status == VKP_OK);
    keep(self, path, sock, now.era);
}

/* As if that many others had references to the socket of path 0. */
static void add_references(uint64_t count)
{
    uint64_t *word = &find_handle(&now.actors[MAIN], 0)->sock->word;
    VKP_I_STORE(word, VKP_I_LOAD(word) + count);
}

static void begin_actors(void)
{
    struct actor *first = &now.actors[MAIN];
    unsigned i;
    unsigned path;
    if (!is(FRESH)) {
        hand_out(first, 0);
        hand_out(first, 1);
        downgrade(first);
    }
    for (i = 0; i < now.living; i++) {
        struct actor *self = &now.actors[i];
        self->weak = first->weak;
        self->weak_file = first->weak_file;
        for (path = 0; path < 2; path++) {
            if (strchr(scenario()->actors[i], "ab"[path]) != NULL) {
                hand_out(self, path);
            }
        }
    }
    if (is(FULL)) {
        now.others = first->registry->config.max_references - 2 -
                     vkp_socket_get_ref_count(find_handle(first, 0)->sock);
        add_references(now.others);
    }
    for (path = is(FULL); path < 2 && !is(FRESH); path++) {
        give(first, path);
    }
}

static void before(void)
{
    unsigned i;
    memset(&now, 0, sizeof now);
    disk_format(is(PROCESSES));
    disk_on_unlink = on_unlink;
    now.foreign = -1;
    now.sys = *environment()->sys;
    now.env = *environment();
    now.env.sys = &now.sys;
    disk_install(&now.sys);
    for (i = 0; i < PATHS; i++) {
        now.places[i].name = names[i][0];
        now.places[i].lock = names[i][1];
    }
    if (is(LINGERS) || is(CHECKS)) {
        open_loop();
    }
    open_registry(0);
    if (is(PROCESSES)) {
        open_registry(1);
    }
    now.living = model_now->threads;
    for (i = 0; i <= MAIN; i++) {
        now.actors[i].registry = now.registries[is(PROCESSES) && i < MAIN ? i % 2 : 0];
    }
    begin_actors();
    for (i = 0; i < now.living; i++) {
        (void)vkp_registry_ref(now.actors[i].registry);
    }
    for (i = 0; i < 2 && is(ORPHAN); i++) {
        vkp_registry_unref(now.registries[i]);
    }
    disk_stop(0, scenario()->stop);
}

static void thread(unsigned index)
{
    struct actor *self = &now.actors[index];
    const char *next;
    unsigned path;
    bool first = true;
    for (next = scenario()->actors[index]; *next != '\0'; next++) {
        if (*next != 'a' && *next != 'b') {
            if (!first) {
                model_step(); /* here nobody is inside */
            }
            first = false;
            call(self, *next);
        }
    }
    if (index == 0) {
        vkp_registry_unref(self->registry); /* sockets that live keep it */
    }
    for (path = 0; path < PATHS; path++) {
        while (find_handle(self, path) != NULL) {
            give(self, path);
        }
    }
    if (index > 0) {
        vkp_registry_unref(self->registry);
    }
    if (--now.living == 1) {
        disk_go_on();
    }
}

/* Let those that linger end, and the loop give back what it has of the registry. */
static void end_loop(void)
{
    unsigned rounds;
    if (is(LINGERS) && !has("klx")) {
        MODEL_CHECK(disk_binds(now.places[0].name) == 1); /* whoever asked got the same again */
    }
    if (is(CLOSES)) {
        vkp_loop_close(now.loop);
    }
    for (rounds = 0; rounds < 3 && !is(CLOSES) && !has("x"); rounds++) {
        vkp_status status = vkp_loop_run_once(now.loop, model_clock_ns() + ROUND_NS);
        MODEL_CHECK(status == VKP_OK);
    }
}

static void after(void)
{
    unsigned i;
    if (now.loop != NULL) {
        end_loop();
    }
    if (is(FULL)) {
        add_references(0 - now.others);
        give(&now.actors[MAIN], 0);
    }
    if (now.foreign >= 0) {
        disk_move_out(now.foreign);
    }
    MODEL_CHECK(disk_is_empty());
    for (i = 0; i < 2 && now.registries[i] != NULL && !is(ORPHAN); i++) {
        MODEL_CHECK(vkp_registry_get_count(now.registries[i]) == 0);
        check_registry(now.registries[i], 0, 0);
        MODEL_CHECK(VKP_I_LOAD(&now.registries[i]->refs) == 1);
        vkp_registry_unref(now.registries[i]);
    }
    vkp_loop_unref(now.loop);
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static struct socket_scenario all[1000];
static unsigned used;

static void add(struct socket_scenario what, unsigned preemptions)
{
    static const char *const flags[] = {"fresh",     "narrow",  "orphan", "processes",
                                        "lingering", "closing", "full",   "checked"};
    struct model model = {.before = before, .thread = thread, .after = after, .stale = 1};
    size_t length;
    size_t i;
    all[used] = what;
    model.preemptions = preemptions;
    model.scenario[0] = (uintptr_t)&all[used++];
    length = (size_t)snprintf(model.name, sizeof model.name, "socket");
    for (i = 0; i < ACTORS && what.actors[i] != NULL; i++, model.threads++) {
        length += (size_t)snprintf(model.name + length, sizeof model.name - length, "%s %s",
                                   i > 0 ? " |" : "", what.actors[i]);
    }
    for (i = 0; i < COUNT(flags); i++) {
        if ((what.flags & (1u << i)) != 0) {
            length +=
                (size_t)snprintf(model.name + length, sizeof model.name - length, ", %s", flags[i]);
        }
    }
    if (what.stop > 0) {
        snprintf(model.name + length, sizeof model.name - length, ", stop %u", what.stop);
    }
    model_add(&model);
}

/* Path 1 is in the chain of path 0 of any map up to 16 buckets, path 2 in none of them. */
static void choose_names(void)
{
    vkp_i_map map;
    uint64_t first = 0;
    unsigned i = 0;
    unsigned path = 0;
    memset(&map, 0, sizeof map);
    for (; path < PATHS; i++) {
        char name[16];
        uint64_t hash;
        int length = snprintf(name, sizeof name, "/s%u", i);
        hash = vkp_i_map_hash(&map, vkp_i_str(name, (size_t)length));
        if (path == 0 || (path == 1 && ((hash ^ first) & 15) == 0) ||
            (path == 2 && ((hash ^ first) & 1) != 0)) {
            first = path == 0 ? hash : first;
            snprintf(names[path][0], sizeof names[path][0], "%s", name);
            snprintf(names[path][1], sizeof names[path][1], "%s.lock", name);
            path++;
        }
    }
}

void socket_models(void)
{
    static const char *const calls[] = {"au", "aru", "aucu", "auCU", "cu", "eu",  "awu",
                                        "k",  "g",   "nu",   "CU",   "tv", "bUcu"};
    /* The last unref's thread finds the lock taken by one that does not go on. */
    static const char *const stopped[] = {"tv", "bU", "au", "k"};
    static const char *const last[] = {"au", "aruu", "awuu", "aeuu", "bUauw"};
    static const char *const triples[][ACTORS] = {
        {"au", "au", "cu"},     {"au", "cu", "cu"},     {"au", "wu", "cu"},
        {"au", "wu", "wu"},     {"au", "eu", "cu"},     {"au", "bU", "tv"},
        {"au", "bU", "eEuU"},   {"aucu", "wu", "eu"},   {"auCU", "wu", "eu"},
        {"auCU", "bUcu", "eE"}, {"auCU", "cu", "Eu"},   {"au", "k", "cu"},
        {"cu", "k", "wu"},      {"au", "nu", "eu"},     {"aucu", "tv", "wdwu"},
        {"autv", "bE", "cu"},   {"adcuwu", "auc", "w"}, {"au", "g", "cu"},
        {"au", "CU", "tv"},     {"au", "m", "eu"},
    };
    static const char *const lingering[] = {"au", "aucu", "cu",   "eu", "wu", "auwu",
                                            "k",  "g",    "bUCU", "ll", "x",  "lx"};
    static const char *const checked[][ACTORS] = {
        {"azu", "l"},        {"azu", "ll"},      {"au", "zll"},       {"azu", "cu", "ll"},
        {"aucu", "z", "ll"}, {"azu", "k", "ll"}, {"azaw", "u", "lx"}, {"cu", "zcu", "ll"}};
    static const char *const later[][ACTORS] = {
        {"au", "cux"},      {"au", "cukcu"},      {"au", "cu", "ll"},
        {"au", "wu", "x"},  {"au", "cu", "k"},    {"au", "cuU", "k"},
        {"au", "au", "lx"}, {"aucu", "wu", "ll"}, {"au", "cu", "kcu"}};
    size_t i;
    size_t k;
    unsigned n;
    choose_names();
    add((struct socket_scenario){{"cu", "cu"}, FRESH, 0}, 2);
    add((struct socket_scenario){{"cu", "CU"}, FRESH | NARROW, 0}, 2);
    add((struct socket_scenario){{"cu", "eEu"}, FRESH | NARROW, 0}, 2);
    add((struct socket_scenario){{"cu", "CU", "eE"}, FRESH | NARROW, 0}, 1);
    /* The slot of path 1 comes to stand before the younger one of path 0. */
    add((struct socket_scenario){{"bkcUCu", "e"}, FRESH | NARROW, 0}, 2);
    add((struct socket_scenario){{"cu", "CU", "tv"}, FRESH | NARROW, 0}, 1);
    add((struct socket_scenario){{"au", "cu"}, ORPHAN, 0}, 2);
    add((struct socket_scenario){{"au", "au"}, ORPHAN, 0}, 2);
    add((struct socket_scenario){{"au", "bU"}, ORPHAN, 0}, 2);
    add((struct socket_scenario){{"au", "k"}, ORPHAN, 0}, 2);
    /* Thread 0 has no reference of the registry any more when it gives its handles back. */
    add((struct socket_scenario){{"a", "a"}, ORPHAN, 0}, 2);
    add((struct socket_scenario){{"a", "bU"}, ORPHAN, 0}, 2);
    add((struct socket_scenario){{"a", "cu"}, ORPHAN, 0}, 2);
    add((struct socket_scenario){{"ab", "k"}, ORPHAN, 0}, 2);
    add((struct socket_scenario){{"a", "wu", "tv"}, ORPHAN, 0}, 1);
    add((struct socket_scenario){{"aru", "mu"}, 0, 0}, 2);
    add((struct socket_scenario){{"au", "mcu"}, 0, 0}, 2);
    add((struct socket_scenario){{"am", "k"}, 0, 0}, 2);
    add((struct socket_scenario){{"ar", "au"}, FULL, 0}, 2);
    add((struct socket_scenario){{"arr", "aru"}, FULL, 0}, 2);
    add((struct socket_scenario){{"ar", "ar", "wu"}, FULL, 0}, 1);
    add((struct socket_scenario){{"au", "cu"}, PROCESSES, 0}, 4);
    add((struct socket_scenario){{"aucu", "cu"}, PROCESSES, 0}, 4);
    add((struct socket_scenario){{"cu", "cucu"}, PROCESSES, 0}, 4);
    add((struct socket_scenario){{"au", "cu", "cu"}, PROCESSES, 0}, 2);
    for (i = 0; i < COUNT(triples); i++) {
        static const uint32_t flags[] = {0, ORPHAN, NARROW};
        const char *const *actors = triples[i];
        add((struct socket_scenario){{actors[0], actors[1], actors[2]}, flags[i % 3], 0}, 1);
    }
    for (i = 0; i < COUNT(stopped); i++) {
        for (k = 0; k < COUNT(last); k++) {
            for (n = 1; n <= (stopped[i][0] == 't' ? 8 : 4); n++) {
                if (stopped[i][0] == 'k' && strchr(last[k], 'e') != NULL) {
                    continue; /* that it is not there any more, only the lock's holder knows */
                }
                add((struct socket_scenario){{stopped[i], last[k]}, 0, n}, 2);
            }
        }
    }
    for (i = 0; i < COUNT(lingering); i++) {
        for (k = i; k < COUNT(lingering); k++) {
            if (strpbrk(lingering[i], "lx") == NULL || strpbrk(lingering[k], "lx") == NULL) {
                add((struct socket_scenario){{lingering[i], lingering[k]},
                                             LINGERS | (k % 2 == 0 ? CLOSES : 0),
                                             0},
                    2);
            }
        }
    }
    for (i = 0; i < COUNT(later); i++) {
        const char *const *actors = later[i];
        add((struct socket_scenario){{actors[0], actors[1], actors[2]}, LINGERS, 0}, 1);
    }
    for (i = 0; i < COUNT(checked); i++) {
        const char *const *actors = checked[i];
        add((struct socket_scenario){{actors[0], actors[1], actors[2]}, CHECKS, 0},
            actors[2] == NULL ? 2 : 1);
    }
    for (i = 0; i < COUNT(calls); i++) {
        for (k = i; k < COUNT(calls); k++) {
            add((struct socket_scenario){{calls[i], calls[k]}, (i + k) % 2 == 0 ? NARROW : 0, 0},
                2);
        }
    }
}
