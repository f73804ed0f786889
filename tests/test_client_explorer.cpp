// SPDX-License-Identifier: MIT
//
// All sequences of events of a client up to a depth: what the program, the server and the clock can
// do, in every order. A client of its own runs each sequence, over a socket pair and with a virtual
// clock; a model beside it says what the client has to do. Everything is in fixed arrays, because
// there are hundreds of thousands of sequences.
#include "support/catch.hpp"
#include "support/fake_server.h"
#include "support/sanitized.h"

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace {

// ---------------------------------------------------------------------------------------------
// What can happen

enum Event {
    WANT_A,
    WANT_B,
    LEAVE_A,
    LEAVE_B,
    COMMAND,
    ANSWER,    // the oldest command, with success
    BUSY,      // SUBSCRIBE and UNSUBSCRIBE: refused, it passes
    NOPERM,    // SUBSCRIBE: refused, it lasts
    NULL_PUSH, // UNSUBSCRIBE: a push for no name
    MOVED,     // UNSUBSCRIBE: an error, and the name is not held any longer
    PUSH_AND_MOVED,
    NOSUB, // UNSUBSCRIBE of what the server does not hold: an error
    TAKE_A,
    TAKE_B,
    FORGET_A, // the server drops the name and says nothing
    FORGET_B,
    HANG_UP,
    TIME, // passes until the next timer
    RUN,  // where a world says so: the loop runs only here
    EVENTS
};

const char *const event_names[EVENTS] = {
    "want a",   "want b",    "leave a", "leave b",        "command", "answer", "busy",
    "noperm",   "null push", "moved",   "push and moved", "nosub",   "take a", "take b",
    "forget a", "forget b",  "hang up", "time",           "run"};

constexpr int usual_depth = VKP_TEST_SANITIZED ? 6 : 7;

constexpr uint32_t bit(Event event)
{
    return UINT32_C(1) << event;
}

// The events of one exploration, what happens before the first, and how many sequences there are.
struct World {
    const char *name;
    int names;
    uint32_t events;
    std::vector<Event> before;
    int most;              // calls of subscribe for a name, and commands, at a time
    uint64_t sequences[2]; // of 6 and of 7 events
    bool each_runs;        // the loop runs behind each event; otherwise only behind RUN and TIME
};

const uint32_t leaving_forms = bit(NULL_PUSH) | bit(MOVED) | bit(PUSH_AND_MOVED) | bit(NOSUB);

// ---------------------------------------------------------------------------------------------
// The server and the model

enum Owed { OWED_HELLO, OWED_SUBSCRIBE, OWED_UNSUBSCRIBE, OWED_FENCE, OWED_INFO, OWED_REPLY };

struct Debt {
    Owed kind;
    int name;         // of SUBSCRIBE and UNSUBSCRIBE
    int number;       // of a command
    uint32_t period;  // of the name, when the command arrived
    uint64_t at;      // when it arrived
    uint32_t changes; // of the model, when it arrived
};

constexpr uint64_t connect_ns = 5000 * ms; // the default of connect_timeout_ms
constexpr int most_names = 2;
constexpr int most_debts = 64;
constexpr int most_calls = 32; // of subscribe_then, and commands
constexpr int most_messages = 512;

// What the model knows of one name.
struct Name {
    int wanted;
    uint32_t period;   // counts the times in which the name is wanted
    bool held;         // by the server, for the connection that is there now
    bool confirmed;    // in this period, and not lost since
    bool kept;         // the server refused to end it
    uint64_t gap;      // messages may be missing from then on; 0: none
    const char *words; // of the last event REFUSED; null: none since it was confirmed
    int subscribed, lost, refused, unsubscribed; // events that must have come
    int unfenced;                                // UNSUBSCRIBEs refused, before their fence
    int got_subscribed, got_lost, got_refused, got_unsubscribed;
    uint32_t confirmed_period, refused_period; // the last one that the server answered so
    bool on; // what the events say: the program believes that it is subscribed
};

struct Message {
    int name;
    uint64_t at;
    bool needed; // the program must get it, or a GAP that covers it
    bool delivered;
};

struct Call {
    int calls;
    vkp_status status;
    int name; // of subscribe_then
    uint32_t period;
    int answered; // of a command: the server's answer was written
    bool failed;  // of a command: its connection was lost
};

class Run;
Run *current; // for the table of system calls, which has no user pointer

int pair_socket(int, int);

const vkp_sys *explorer_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.random_u64 = [] { return uint64_t{1}; };
        copy.socket = pair_socket;
        copy.connect = [](int, const void *, uint32_t) { return 0; };
        return copy;
    }();
    return &table;
}

// One client, from its open to its end.
class Run {
  public:
    Run(vkp_loop *on, const World &in) : loop(on), world(in)
    {
        current = this;
        vkp_client_config config = {};
        config.address = vkp_str_of("unix:/explorer");
        config.retry_min_ms = 1;
        config.retry_max_ms = 1;
        config.reply_timeout_ms = VKP_OFF;
        config.on_push = [](void *user, const vkp_push *push) {
            static_cast<Run *>(user)->on_push(*push);
        };
        config.user = this;
        if (vkp_client_open(loop, &config, &client) != VKP_OK) {
            vkp_test_fail("no client");
        }
        run();
    }
    ~Run()
    {
        close_server();
        current = nullptr;
    }
    Run(const Run &) = delete;
    Run &operator=(const Run &) = delete;

    bool is_possible(Event event) const;
    void happen(Event event, bool runs); // runs: the loop runs behind it
    void settle();
    // Closes the client; what was wrong first, or null.
    const char *finish()
    {
        vkp_client_unref(client);
        for (int i = 0; i < 2 && vkp_loop_run_once(loop, 0) == VKP_OK; i++) {
        }
        (void)hear();
        check(server < 0 || ended, "the client left its descriptor open");
        for (int i = 0; i < command_count; i++) {
            check(commands[i].calls == 1, "one outcome for each command");
        }
        for (int i = 0; i < want_count; i++) {
            check(wants[i].calls == 1, "one outcome for each subscribe_then");
        }
        return problem_;
    }

    // The client connects: the other end of the pair is the server's.
    int connect()
    {
        int ends[2];
        if (server >= 0) {
            wrong("a second connection");
            return -EMFILE;
        }
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) {
            vkp_test_fail("no socket pair");
        }
        (void)vkp_sys_get_default()->prepare(ends[0]);
        (void)vkp_sys_get_default()->prepare(ends[1]);
        server = ends[1];
        ended = false;
        ready = false;
        begun_ns = now();
        known_ns = now();
        return ends[0];
    }

  private:
    uint64_t now() const
    {
        return vkp_loop_get_now_ns(loop);
    }
    void wrong(const char *what)
    {
        if (problem_ == nullptr) {
            problem_ = what;
        }
    }
    void check(bool right, const char *what)
    {
        if (!right) {
            wrong(what);
        }
    }

    // ---- the wire ----

    void put(const char *format, ...) __attribute__((format(printf, 2, 3)))
    {
        va_list arguments;
        va_start(arguments, format);
        out_bytes += static_cast<size_t>(
            vsnprintf(out + out_bytes, sizeof out - out_bytes, format, arguments));
        va_end(arguments);
    }
    void flush()
    {
        if (out_bytes > 0) {
            const vkp_range range = {out, out_bytes};
            check(vkp_sys_get_default()->send(server, &range, 1) == static_cast<int64_t>(out_bytes),
                  "the client hung up");
            wrote = true;
            out_bytes = 0;
        }
    }
    // Each name that is held gets a message.
    void publish()
    {
        for (int i = 0; i < world.names && ready; i++) {
            if (names[i].held && message_count < most_messages) {
                Message &message = messages[message_count];
                message = {i, now(), names[i].confirmed && names[i].wanted > 0, false};
                put(">3\r\n$8\r\nsmessage\r\n$1\r\n%c\r\n$3\r\n%03d\r\n", 'a' + i, message_count);
                message_count++;
            }
        }
    }
    void close_server()
    {
        if (server >= 0) {
            ::close(std::exchange(server, -1));
        }
        in_bytes = 0;
        out_bytes = 0;
    }
    // One command of n words from `in`; 0: it is not whole.
    size_t parse(const char **words, size_t *lens, int *count) const
    {
        size_t at = 1;
        if (in_bytes == 0 || memchr(in, '\n', in_bytes) == nullptr) {
            return 0;
        }
        *count = atoi(in + 1);
        at = static_cast<size_t>(static_cast<const char *>(memchr(in, '\n', in_bytes)) - in) + 1;
        for (int i = 0; i < *count; i++) {
            const char *line = at < in_bytes
                                   ? static_cast<const char *>(memchr(in + at, '\n', in_bytes - at))
                                   : nullptr;
            if (line == nullptr) {
                return 0;
            }
            lens[i] = static_cast<size_t>(atoi(in + at + 1));
            at = static_cast<size_t>(line - in) + 1;
            words[i] = in + at;
            at += lens[i] + 2;
            if (at > in_bytes) {
                return 0;
            }
        }
        return at;
    }
    // Read what the client wrote, and owe an answer to each command. False: nothing came.
    bool hear()
    {
        const char *words[8];
        size_t lens[8];
        int count = 0;
        size_t bytes;
        if (server < 0) {
            return false;
        }
        const ssize_t got = recv(server, in + in_bytes, sizeof in - 1 - in_bytes, MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK)) {
            ended = true;
        }
        if (got <= 0) {
            return false;
        }
        in_bytes += static_cast<size_t>(got);
        in[in_bytes] = '\0';
        while ((bytes = parse(words, lens, &count)) > 0) {
            owe(words);
            in_bytes -= bytes;
            memmove(in, in + bytes, in_bytes);
        }
        return true;
    }
    void owe(const char *const *words);
    void answer(Event event);
    void answer_leave(const Debt &debt, Event event);
    void refuse(const Debt &debt, const char *words);
    void lose_name(Name &name, uint64_t from)
    {
        if (name.confirmed) {
            name.confirmed = false;
            name.gap = name.gap != 0 ? name.gap : from;
        }
        changes++;
    }
    void audit(const Debt &debt);
    void hang_up();
    void lose_connection();
    bool has_owed(int name) const
    {
        for (int i = 0; i < debt_count; i++) {
            if ((debts[i].kind == OWED_SUBSCRIBE || debts[i].kind == OWED_UNSUBSCRIBE) &&
                (name < 0 || debts[i].name == name)) {
                return true;
            }
        }
        return false;
    }

    // ---- the client ----

    void want(int i);
    void leave(int i);
    void ask();
    void run();
    void on_push(const vkp_push &push);
    void on_message(const vkp_push &push, Name &name);
    void on_gap(const vkp_gap &gap);
    static void on_done(void *user, vkp_status status, vkp_str words);
    static void on_reply(void *user, vkp_status status, const vkp_value *value,
                         const vkp_bytes *frame);
    void check_step();
    void check_end();
    bool is_quiet() const;

    vkp_loop *loop;
    const World &world;
    vkp_client *client = nullptr;
    const char *problem_ = nullptr;
    int server = -1;
    bool ended = false;      // the client closed its end
    bool ready = false;      // HELLO is answered
    bool wrote = false;      // since the loop ran last
    uint64_t begun_ns = 0;   // when the client began to connect
    uint64_t known_ns = 0;   // when it sent the newest request that was answered
    uint64_t audited_ns = 0; // when the counts agreed last
    uint32_t changes = 0;
    int disconnected = 0, got_disconnected = 0, connected = 0, got_connected = 0;
    int failed = 0, got_failed = 0;
    bool failure_told = false;
    Name names[most_names] = {};
    Debt debts[most_debts];
    int debt_count = 0;
    Message messages[most_messages];
    int message_count = 0;
    int checked_messages = 0;
    int last_message[most_names] = {-1, -1};
    Call wants[most_calls] = {};
    int want_count = 0;
    Call commands[most_calls] = {};
    int command_count = 0;
    int open_commands = 0;
    char in[8192];
    size_t in_bytes = 0;
    char out[8192];
    size_t out_bytes = 0;
};

int pair_socket(int, int)
{
    return current != nullptr ? current->connect() : -EMFILE;
}

// ---- what the server hears ----

void Run::owe(const char *const *words)
{
    Debt debt = {OWED_REPLY, 0, 0, 0, now(), 0};
    if (debt_count == most_debts) {
        wrong("too many commands without an answer");
        return;
    }
    if (strncmp(words[0], "HELLO", 5) == 0) {
        debt.kind = ready ? OWED_FENCE : OWED_HELLO;
    } else if (strncmp(words[0], "CLIENT", 6) == 0) {
        debt.kind = OWED_INFO;
    } else if (strncmp(words[0], "GET", 3) == 0) {
        debt.number = atoi(words[1]);
    } else {
        debt.kind = words[0][1] == 'S' ? OWED_SUBSCRIBE : OWED_UNSUBSCRIBE;
        debt.name = words[1][0] - 'a';
        Name &name = names[debt.name];
        debt.period = name.period;
        changes++;
        if (debt.kind == OWED_SUBSCRIBE && (world.events & (bit(FORGET_A) | bit(FORGET_B))) == 0) {
            // The server has no SUBSCRIBE of a name twice: it leaves in between.
            bool has = name.held && !name.kept;
            for (int i = 0; i < debt_count; i++) {
                if (debts[i].name == debt.name && debts[i].kind == OWED_SUBSCRIBE) {
                    has = true;
                } else if (debts[i].name == debt.name && debts[i].kind == OWED_UNSUBSCRIBE) {
                    has = false;
                }
            }
            check(!has || !world.each_runs, "a second SUBSCRIBE");
        }
    }
    debt.changes = changes;
    debts[debt_count++] = debt;
}

// ---- what the server says ----

void Run::answer_leave(const Debt &debt, Event event)
{
    Name &name = names[debt.name];
    if (event == BUSY) {
        put("-BUSY wait\r\n");
        name.kept = name.held;
        name.unfenced++;
        return;
    }
    name.held = false;
    name.unsubscribed++;
    if (event == ANSWER || event == PUSH_AND_MOVED) {
        put(">3\r\n$12\r\nsunsubscribe\r\n$1\r\n%c\r\n:0\r\n", 'a' + debt.name);
    }
    if (event == NULL_PUSH) {
        put(">3\r\n$12\r\nsunsubscribe\r\n_\r\n:0\r\n");
    }
    if (event == MOVED || event == PUSH_AND_MOVED) {
        put("-MOVED 5 127.0.0.1:7001\r\n");
    }
    if (event == NOSUB) {
        put("-NOSUB not subscribed\r\n");
    }
}

void Run::refuse(const Debt &debt, const char *words)
{
    Name &name = names[debt.name];
    put("-%s\r\n", words);
    name.refused_period = debt.period;
    if (debt.period == name.period && name.wanted > 0 && name.words != words) {
        name.words = words;
        name.refused++;
    }
}

// The server counts what it has. The client compares when nothing has changed since it asked.
void Run::audit(const Debt &debt)
{
    char line[64];
    int held = 0;
    int confirmed = 0;
    bool stuck = false;
    for (int i = 0; i < world.names; i++) {
        held += names[i].held ? 1 : 0;
        confirmed += names[i].confirmed ? 1 : 0;
        stuck = stuck || (names[i].held && names[i].wanted == 0);
    }
    snprintf(line, sizeof line, "id=1 sub=0 psub=0 ssub=%d\n", held);
    put("$%d\r\n%s\r\n", static_cast<int>(strlen(line)), line);
    if (debt.changes != changes || has_owed(-1) || stuck) {
        return;
    }
    if (held < confirmed) {
        for (int i = 0; i < world.names; i++) {
            lose_name(names[i], audited_ns);
        }
    } else if (held == confirmed) {
        audited_ns = debt.at;
    }
}

void Run::answer(Event event)
{
    const Debt debt = debts[0];
    Name &name = names[debt.name];
    memmove(debts, debts + 1, static_cast<size_t>(--debt_count) * sizeof debts[0]);
    publish();
    if (debt.kind != OWED_UNSUBSCRIBE) { // the fence counts
        known_ns = std::max(known_ns, debt.at);
    }
    switch (debt.kind) {
    case OWED_HELLO:
        put("%%2\r\n+proto\r\n:3\r\n+id\r\n:1\r\n");
        ready = true;
        audited_ns = now();
        failure_told = false;
        connected++;
        break;
    case OWED_SUBSCRIBE:
        changes++;
        if (event != ANSWER) {
            refuse(debt, event == BUSY ? "BUSY wait" : "NOPERM no");
            break;
        }
        put(">3\r\n$10\r\nssubscribe\r\n$1\r\n%c\r\n:1\r\n", 'a' + debt.name);
        name.held = true;
        name.kept = false;
        name.subscribed++;
        name.confirmed_period = debt.period;
        if (debt.period == name.period && name.wanted > 0) {
            name.confirmed = true;
            name.words = nullptr;
        }
        break;
    case OWED_UNSUBSCRIBE:
        changes++;
        answer_leave(debt, event);
        break;
    case OWED_FENCE:
        changes++;
        for (Name &name : names) {
            name.unfenced = 0;
        }
        put("%%2\r\n+proto\r\n:3\r\n+id\r\n:1\r\n");
        break;
    case OWED_INFO:
        audit(debt);
        break;
    case OWED_REPLY:
        put(":%d\r\n", debt.number);
        commands[debt.number].answered = 1;
        break;
    }
    publish();
    flush();
}

void Run::hang_up()
{
    publish();
    flush();
    if (wrote && world.each_runs) {
        run(); // the model's moment of the last byte
    }
    lose_connection();
}

// The client's connection is over, or its try.
void Run::lose_connection()
{
    close_server();
    disconnected += ready ? 1 : 0;
    failed += !ready && !failure_told ? 1 : 0;
    failure_told = !ready;
    ready = false;
    for (int i = 0; i < debt_count; i++) { // what is being left is left with the connection
        if (debts[i].kind == OWED_UNSUBSCRIBE) {
            names[debts[i].name].unsubscribed++;
        }
    }
    for (int i = 0; i < world.names; i++) {
        names[i].unsubscribed += names[i].unfenced;
        names[i].unfenced = 0;
        lose_name(names[i], known_ns);
        names[i].held = false;
        names[i].words = nullptr;
    }
    for (int i = 0; i < command_count; i++) {
        commands[i].failed = commands[i].failed || commands[i].answered == 0;
    }
    debt_count = 0;
}

// ---- what the program does ----

void Run::want(int i)
{
    Call &call = wants[want_count++];
    names[i].period += names[i].wanted == 0 ? 1u : 0u;
    call.name = i;
    call.period = names[i].period;
    names[i].wanted++;
    call.status = VKP_ERR_EMPTY;
    const char text[2] = {static_cast<char>('a' + i), '\0'};
    check(vkp_client_subscribe_then(client, VKP_SUB_SHARD, vkp_str_of(text), on_done, &call) ==
              VKP_OK,
          "subscribe failed");
}

void Run::leave(int i)
{
    const char text[2] = {static_cast<char>('a' + i), '\0'};
    Name &name = names[i];
    if (--name.wanted == 0) {
        changes++;
        name.confirmed = false;
        name.gap = 0;
        name.words = nullptr;
        for (int k = 0; k < message_count; k++) {
            messages[k].needed = messages[k].needed && messages[k].name != i;
        }
    }
    check(vkp_client_unsubscribe(client, VKP_SUB_SHARD, vkp_str_of(text)) == VKP_OK,
          "unsubscribe failed");
}

void Run::ask()
{
    char text[64];
    const int len = snprintf(text, sizeof text, "*2\r\n$3\r\nGET\r\n$1\r\n%d\r\n", command_count);
    vkp_bytes bytes;
    commands[command_count].status = VKP_ERR_EMPTY;
    check(vkp_bytes_copy(nullptr, text, static_cast<size_t>(len), &bytes) == VKP_OK, "no memory");
    if (vkp_client_send(client, &bytes, 1, on_reply, &commands[command_count]) == VKP_OK) {
        command_count++;
        open_commands++;
    } else {
        check(vkp_client_get_state(client) == VKP_CLIENT_WAITING, "a command was not taken");
    }
    vkp_bytes_unref(&bytes);
}

void Run::on_done(void *user, vkp_status status, vkp_str)
{
    Call *call = static_cast<Call *>(user);
    Run *self = current;
    call->calls++;
    call->status = status;
    const Name &name = self->names[call->name];
    self->check(status != VKP_OK || name.confirmed_period >= call->period,
                "an outcome OK without a confirmation");
    self->check(status != VKP_ERR_REFUSED || name.refused_period >= call->period,
                "an outcome REFUSED without a refusal");
}

void Run::on_reply(void *user, vkp_status status, const vkp_value *value, const vkp_bytes *)
{
    Call *call = static_cast<Call *>(user);
    Run *self = current;
    call->calls++;
    call->status = status;
    self->open_commands--;
    const int number = static_cast<int>(call - self->commands);
    if (status == VKP_OK) {
        self->check(value->type == VKP_RESP_INTEGER && value->u.integer == number,
                    "another command's reply");
        self->check(call->answered == 1, "a reply that nobody wrote");
    }
}

// ---- what the client reports ----

void Run::on_message(const vkp_push &push, Name &name)
{
    const int number = atoi(std::string(push.payload.ptr, push.payload.len).c_str());
    const int at = static_cast<int>(&name - names);
    if (number >= message_count || messages[number].name != at) {
        wrong("a message that nobody wrote");
        return;
    }
    check(!messages[number].delivered, "a message twice");
    check(number > last_message[at], "messages out of order");
    messages[number].delivered = true;
    last_message[at] = number;
}

// A GAP covers what was lost and is back, from the last byte before the first loss.
void Run::on_gap(const vkp_gap &gap)
{
    uint64_t from = VKP_FOREVER;
    for (int i = 0; i < world.names; i++) {
        Name &name = names[i];
        bool covered = gap.name_count == 0 && name.confirmed && name.wanted > 0;
        for (size_t k = 0; k < gap.name_count; k++) {
            covered = covered || gap.names[k].name.ptr[0] == 'a' + i;
        }
        if (!covered) {
            continue;
        }
        for (int k = 0; k < message_count; k++) {
            Message &message = messages[k];
            if (message.name == i && message.at >= gap.from_ns && message.at <= gap.to_ns) {
                message.needed = false;
            }
        }
        if (world.each_runs) {
            check(name.confirmed && name.wanted > 0, "a GAP covers a name that is not back");
            check(name.gap != 0, "a GAP covers a name that was not lost");
            from = std::min(from, name.gap);
        }
        name.gap = 0;
    }
    for (int i = 0; i < world.names && world.each_runs; i++) {
        check(names[i].gap == 0 || names[i].confirmed || !has_owed(i),
              "a GAP before each name has its answer");
    }
    check(gap.to_ns == now() && gap.from_ns <= gap.to_ns, "a GAP of another time");
    check(!world.each_runs || gap.from_ns == from, "a GAP begins at another moment");
}

void Run::on_push(const vkp_push &push)
{
    const int at = push.channel.len == 1 ? push.channel.ptr[0] - 'a' : most_names;
    Name none = {};
    Name &name = at >= 0 && at < world.names ? names[at] : none;
    switch (push.kind) {
    case VKP_PUSH_SMESSAGE:
        on_message(push, name);
        break;
    case VKP_PUSH_SUBSCRIBED:
        name.got_subscribed++;
        name.on = true;
        break;
    case VKP_PUSH_UNSUBSCRIBED:
        name.got_unsubscribed++;
        name.on = false;
        break;
    case VKP_PUSH_LOST:
        check(name.on, "LOST of what was not subscribed");
        name.got_lost++;
        name.on = false;
        break;
    case VKP_PUSH_REFUSED:
        name.got_refused++;
        name.on = false;
        break;
    case VKP_PUSH_GAP:
        on_gap(*push.gap);
        break;
    case VKP_PUSH_CONNECTED:
    case VKP_PUSH_RECONNECTED:
        check((push.kind == VKP_PUSH_CONNECTED) == (got_connected == 0), "RECONNECTED at first");
        got_connected++;
        break;
    case VKP_PUSH_DISCONNECTED:
        got_disconnected++;
        for (Name &each : names) {
            each.on = false;
        }
        break;
    case VKP_PUSH_CONNECT_FAILED:
        got_failed++;
        break;
    case VKP_PUSH_MESSAGE:
    case VKP_PUSH_PMESSAGE:
    case VKP_PUSH_INVALIDATE:
    case VKP_PUSH_OTHER:
    case VKP_PUSH_LAGGED:
        wrong("an event of another kind");
        break;
    }
}

// ---- steps ----

// Let the client do all it can without the clock. Then a microsecond passes.
void Run::run()
{
    bool heard = false;
    wrote = false;
    for (int i = 0; i < 2 || heard; i++) {
        if (i > 50 || vkp_loop_run_once(loop, heard || i == 0 ? 0 : now() + 1000) != VKP_OK) {
            wrong("the loop does not get quiet");
            return;
        }
        heard = hear();
    }
    if (server >= 0 && ended && !ready && now() >= begun_ns + connect_ns) {
        lose_connection();
    }
    check(server < 0 || !ended, "the client hung up on a server that did nothing wrong");
}

bool Run::is_possible(Event event) const
{
    const Owed owed = debt_count > 0 ? debts[0].kind : OWED_HELLO;
    const bool asked = debt_count > 0 && owed == OWED_SUBSCRIBE;
    const bool left = debt_count > 0 && owed == OWED_UNSUBSCRIBE;
    const Name &a = names[0];
    const Name &b = names[1];
    if ((world.events & bit(event)) == 0) {
        return false;
    }
    switch (event) {
    case WANT_A:
        return a.wanted < world.most;
    case WANT_B:
        return b.wanted < world.most;
    case LEAVE_A:
        return a.wanted > 0;
    case LEAVE_B:
        return b.wanted > 0;
    case COMMAND:
        return open_commands < world.most;
    case ANSWER:
        return debt_count > 0;
    case BUSY:
        return asked || left;
    case NOPERM:
        return asked;
    case NULL_PUSH: // a server says so when it holds nothing else
        return left && !names[1 - debts[0].name].held;
    case MOVED:
    case PUSH_AND_MOVED:
        return left;
    case NOSUB:
        return left && !names[debts[0].name].held;
    case TAKE_A:
        return a.held;
    case FORGET_A:
        return a.held;
    case TAKE_B:
    case FORGET_B:
        return b.held;
    case HANG_UP:
        return server >= 0;
    case TIME:
        return vkp_loop_get_deadline_ns(loop) != VKP_FOREVER;
    case RUN:
        return true;
    case EVENTS:
        break;
    }
    return false;
}

void Run::happen(Event event, bool runs)
{
    const int b = event == WANT_B || event == LEAVE_B || event == TAKE_B || event == FORGET_B;
    switch (event) {
    case WANT_A:
    case WANT_B:
        want(b);
        break;
    case LEAVE_A:
    case LEAVE_B:
        leave(b);
        break;
    case COMMAND:
        ask();
        break;
    case ANSWER:
    case BUSY:
    case NOPERM:
    case NULL_PUSH:
    case MOVED:
    case PUSH_AND_MOVED:
    case NOSUB:
        answer(event);
        break;
    case TAKE_A:
    case TAKE_B:
        publish();
        put(">3\r\n$12\r\nsunsubscribe\r\n$1\r\n%c\r\n:0\r\n", 'a' + b);
        names[b].held = false;
        names[b].unsubscribed += names[b].confirmed ? 0 : 1;
        names[b].lost += names[b].confirmed ? 1 : 0;
        lose_name(names[b], known_ns);
        publish();
        flush();
        break;
    case FORGET_A:
    case FORGET_B:
        names[b].held = false;
        break;
    case HANG_UP:
        hang_up();
        break;
    case TIME:
        if (vkp_loop_run_once(loop, vkp_loop_get_deadline_ns(loop)) != VKP_OK) {
            wrong("a round failed");
        }
        (void)hear();
        run();
        break;
    case RUN:
    case EVENTS:
        run();
        break;
    }
    if (runs) {
        if (event != TIME) {
            run();
        }
        check_step();
    }
}

// What must be so whenever the client has seen everything.
void Run::check_step()
{
    bool waits = false;
    for (int i = 0; i < command_count; i++) {
        const Call &call = commands[i];
        check(call.calls == 0 || (call.status == VKP_OK) <= (call.answered != 0),
              "a wrong outcome");
        check(!world.each_runs || call.calls == (call.answered != 0 || call.failed ? 1 : 0),
              "an outcome for each command");
        check(!world.each_runs || call.calls == 0 ||
                  (call.status == VKP_OK) == (call.answered != 0),
              "a wrong outcome");
    }
    if (!world.each_runs) {
        return;
    }
    for (int i = 0; i < world.names; i++) {
        const Name &name = names[i];
        check(name.got_subscribed == name.subscribed, "SUBSCRIBED for each confirmation");
        check(name.got_lost == name.lost, "LOST for each loss");
        check(name.got_refused == name.refused, "REFUSED for each new refusal");
        check(name.got_unsubscribed <= name.unsubscribed, "UNSUBSCRIBED without a reason");
        check(!name.confirmed || name.on, "the program does not know that it is subscribed");
        waits = waits || (name.gap != 0 && !name.confirmed && has_owed(i));
    }
    for (int i = 0; i < world.names; i++) {
        check(!names[i].confirmed || names[i].gap == 0 || waits, "a GAP is missing");
    }
    const bool connecting = vkp_client_get_state(client) == VKP_CLIENT_CONNECTING;
    for (int i = 0; i < want_count; i++) {
        check(wants[i].calls == 1 || connecting || has_owed(wants[i].name),
              "subscribe_then has no outcome");
    }
    check(got_disconnected == disconnected, "DISCONNECTED for each loss");
    check(got_connected == connected, "CONNECTED for each connection");
    check(got_failed == failed, "CONNECT_FAILED for each first failure");
    for (; checked_messages < message_count; checked_messages++) {
        check(messages[checked_messages].delivered, "a message is missing");
    }
}

bool Run::is_quiet() const
{
    bool quiet = ready && debt_count == 0 && vkp_client_get_state(client) == VKP_CLIENT_READY;
    for (int i = 0; i < world.names; i++) {
        const bool wanted = names[i].wanted > 0;
        quiet = quiet && names[i].held == wanted && names[i].confirmed == wanted &&
                names[i].on == wanted;
    }
    return quiet;
}

// Answer everything with success and let the time pass, until nothing is left to do.
void Run::settle()
{
    if (!world.each_runs) {
        run();
    }
    for (int i = 0; i < 40 && !is_quiet() && problem_ == nullptr; i++) {
        happen(debt_count > 0 ? ANSWER : TIME, world.each_runs);
        if (!world.each_runs) {
            run();
        }
    }
    if (problem_ == nullptr) {
        check_end();
    }
}

void Run::check_end()
{
    for (int i = 0; i < world.names; i++) {
        check(names[i].held == (names[i].wanted > 0), "the server holds what is not wanted");
        check(names[i].on == (names[i].wanted > 0), "the last event is not what is so");
    }
    check(is_quiet(), "the client does not get quiet");
    ask();
    run();
    happen(ANSWER, world.each_runs);
    run();
    check_step();
    for (int i = 0; i < world.names; i++) {
        check(names[i].gap == 0 || !world.each_runs, "a GAP is missing at the end");
    }
    for (int i = 0; i < message_count; i++) {
        check(messages[i].delivered || !messages[i].needed, "a message is missing at the end");
    }
    check(got_disconnected + got_failed <= disconnected + failed, "more losses than there were");
    for (int i = 0; i < want_count; i++) {
        check(wants[i].calls == 1, "one outcome for each subscribe_then");
    }
}

// ---------------------------------------------------------------------------------------------
// All sequences

std::string text_of(const World &world, const std::vector<Event> &events)
{
    std::string text = world.name;
    for (Event event : events) {
        text += std::string(&event == &events[0] ? ": " : ", ") + event_names[event];
    }
    return text;
}

class Explorer {
  public:
    Explorer(const World &in, int most) : world(in), depth(most)
    {
    }
    // Runs every sequence. The first wrong one is `wrong`.
    uint64_t explore()
    {
        vkp_test_loop loop(&vkp_backend_null, explorer_sys());
        loop.test.env.log = nullptr;
        std::vector<uint32_t> left; // what else is possible, at each depth
        do {
            count++;
            one(loop, left);
            while (!left.empty() && (left.back() &= left.back() - 1) == 0) {
                left.pop_back();
            }
        } while (!left.empty() && wrong.empty());
        return count;
    }
    std::string wrong;

  private:
    // Run the sequence that takes the lowest event of each set, and the lowest possible ones behind
    // them.
    void one(vkp_test_loop &loop, std::vector<uint32_t> &left)
    {
        std::vector<Event> &events = sequence;
        const char *problem;
        events.clear();
        {
            Run run(loop, world);
            for (Event event : world.before) {
                run.happen(event, false);
            }
            for (size_t i = 0; i < static_cast<size_t>(depth); i++) {
                if (i == left.size()) {
                    left.push_back(possible(run));
                }
                if (left[i] == 0) {
                    break;
                }
                int event = 0;
                while ((left[i] >> event & 1) == 0) {
                    event++;
                }
                events.push_back(static_cast<Event>(event));
                run.happen(events.back(), world.each_runs);
            }
            run.settle();
            problem = run.finish();
        }
        if (problem != nullptr) {
            wrong = text_of(world, events) + " => " + problem;
        }
        const size_t blocks = loop.test.i_live_blocks;
        if (count > 1 && blocks != live_blocks && wrong.empty()) {
            wrong = text_of(world, events) + " => memory is left";
        }
        live_blocks = blocks;
    }
    static uint32_t possible(const Run &run)
    {
        uint32_t events = 0;
        for (int i = 0; i < EVENTS; i++) {
            events |= run.is_possible(static_cast<Event>(i)) ? bit(static_cast<Event>(i)) : 0;
        }
        return events;
    }
    const World &world;
    int depth;
    uint64_t count = 0;
    size_t live_blocks = 0;
    std::vector<Event> sequence;
};

// The sequences of the world's depth, or of VKP_TEST_EXPLORER_DEPTH. Under a sanitizer each takes
// several times as long: one event less.
void explore(const World &world)
{
    const char *wanted = getenv("VKP_TEST_EXPLORER_DEPTH");
    const int depth = wanted != nullptr ? atoi(wanted) : usual_depth;
    Explorer explorer(world, depth);
    const uint64_t count = explorer.explore();
    if (wanted != nullptr) {
        printf("%s: %llu sequences of %d events\n", world.name,
               static_cast<unsigned long long>(count), depth);
    }
    INFO(world.name << ": sequences of " << depth << " events");
    CHECK(explorer.wrong == "");
    if (depth == 6 || depth == 7) {
        CHECK(count == world.sequences[depth - 6]);
    }
}

const uint32_t usual =
    bit(WANT_A) | bit(LEAVE_A) | bit(ANSWER) | bit(BUSY) | bit(HANG_UP) | bit(TIME);

} // namespace

TEST_CASE("explorer: one name", "[client]")
{
    explore({"one name",
             1,
             usual | bit(NOPERM) | bit(TAKE_A) | leaving_forms,
             {ANSWER, RUN},
             2,
             {5445, 25107},
             true});
}

TEST_CASE("explorer: one name, refused at first", "[client]")
{
    explore({"one name, refused at first",
             1,
             usual | bit(NOPERM) | bit(TAKE_A) | leaving_forms,
             {ANSWER, RUN, WANT_A, RUN, BUSY, TIME},
             1,
             {3357, 14215},
             true});
}

TEST_CASE("explorer: commands beside a name", "[client]")
{
    explore({"commands beside a name",
             1,
             usual | bit(COMMAND) | bit(PUSH_AND_MOVED) | bit(TAKE_A),
             {ANSWER, RUN, WANT_A, RUN, ANSWER, RUN},
             1,
             {15047, 68006},
             true});
}

TEST_CASE("explorer: two names", "[client]")
{
    explore({"two names",
             2,
             usual | bit(WANT_B) | bit(LEAVE_B),
             {ANSWER, RUN, WANT_A, WANT_B, RUN, ANSWER, ANSWER, RUN},
             1,
             {9496, 44014},
             true});
}

TEST_CASE("explorer: two names that leave together", "[client]")
{
    explore({"two names that leave together",
             2,
             bit(WANT_A) | bit(LEAVE_A) | bit(ANSWER) | bit(BUSY) | leaving_forms | bit(TAKE_A) |
                 bit(TAKE_B),
             {ANSWER, RUN, WANT_A, WANT_B, RUN, ANSWER, ANSWER, RUN, LEAVE_A, LEAVE_B, RUN},
             1,
             {9281, 27790},
             true});
}

TEST_CASE("explorer: a server that forgets", "[client]")
{
    explore({"a server that forgets",
             2,
             usual | bit(FORGET_A) | bit(FORGET_B),
             {ANSWER, RUN, WANT_A, WANT_B, RUN, ANSWER, ANSWER, RUN},
             1,
             {8823, 36985},
             true});
}

TEST_CASE("explorer: several events before the client sees any", "[client]")
{
    explore({"several events before the client sees any",
             1,
             usual | bit(COMMAND) | bit(TAKE_A) | bit(RUN),
             {ANSWER, RUN, WANT_A, RUN, ANSWER, RUN},
             1,
             {26774, 140351},
             false});
}
