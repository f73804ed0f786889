#if VKP_I_IO
/* ======================================================================================
   >>impl-client-private   Blocking commands on connections of their own
   ======================================================================================
   A command that blocks would keep all commands behind it waiting. With private_max each such
   command gets a connection of its own, with the same login, database and setup; the connection is
   kept for the next one for some seconds. When all are in use, commands wait in `waiting`, in their
   order. A command whose one-shot is closed is given up: its connection is closed, because the
   server would hand over, to nobody, what the command waits for. Loop's thread. */

/* One connection for blocking commands. */
struct vkp_i_private {
    vkp_i_link link;
    vkp_i_private *next; /* of client->privates */
    vkp_client *client;  /* one reference */
    size_t refs;         /* of client->privates, and of vkp_i_link_ops.hold */
    vkp_i_ask *ask;      /* what it carries; NULL: nothing */
    vkp_i_request carry; /* stands for the ask in the link's flight */
    vkp_timer timer;     /* ends a try to connect, or the time without a command */
};

#define VKP_I_PRIVATE_IDLE_MS 5000u /* how long a connection is kept without a command */

static vkp_i_private *vkp_i_private_of(vkp_i_link *link)
{
    return VKP_CONTAINER(link, vkp_i_private, link);
}

static void vkp_i_private_hold(vkp_i_link *link)
{
    vkp_i_private_of(link)->refs++;
}

static void vkp_i_private_release(vkp_i_link *link)
{
    vkp_i_private *self = vkp_i_private_of(link);
    vkp_client *client = self->client;
    if (--self->refs == 0) {
        vkp_i_link_deinit(&self->link);
        vkp_i_free(client->env, self, sizeof *self);
        vkp_i_client_release(client);
    }
}

/* End the connection, once; its command moves to `failed`. */
static void vkp_i_private_end(vkp_i_private *self, vkp_i_requests *failed)
{
    vkp_client *client = self->client;
    vkp_i_private **link = &client->privates;
    vkp_i_request *request;
    while (*link != NULL && *link != self) {
        link = &(*link)->next;
    }
    if (*link == NULL) {
        return; /* it has ended */
    }
    *link = self->next;
    client->private_count--;
    vkp_timer_stop(&self->timer);
    vkp_i_link_close(&self->link);
    if (self->ask != NULL) {
        vkp_i_requests_append(failed, &self->ask->request);
        self->ask = NULL;
    }
    while ((request = vkp_i_requests_pop(&self->link.flight)) != NULL) {
        if (request == &self->carry) {
            vkp_bytes_unref(&request->bytes);
        } else {
            request->settle(request, VKP_ERR_CLOSED, NULL, NULL);
        }
    }
    vkp_i_private_release(&self->link);
}

static void vkp_i_client_serve_waiting(vkp_client *client);

/* End the connection; its command gets DISCONNECTED. */
static void vkp_i_private_lost(vkp_i_private *self)
{
    vkp_client *client = self->client;
    vkp_i_requests failed;
    vkp_i_request *request;
    vkp_i_requests_init(&failed);
    vkp_i_private_hold(&self->link);
    vkp_i_private_end(self, &failed);
    while ((request = vkp_i_requests_pop(&failed)) != NULL) {
        request->settle(request, VKP_ERR_DISCONNECTED, NULL, NULL);
    }
    if (!client->closed) {
        vkp_i_client_serve_waiting(client);
    }
    vkp_i_private_release(&self->link);
}

static void vkp_i_private_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                                  const vkp_bytes *frame);
static void vkp_i_private_on_timer(vkp_timer *timer);

/* Start the timer. False: no memory. */
static bool vkp_i_private_start_timer(vkp_i_private *self, uint64_t ms)
{
    return vkp_timer_start(&self->timer, self->client->loop, vkp_i_private_on_timer, 0,
                           vkp_i_after_ms(vkp_i_loop_now(self->client->loop), ms)) == VKP_OK;
}

static void vkp_i_private_caught_up(vkp_i_request *request, vkp_status status,
                                    const vkp_value *value, const vkp_bytes *frame);

/* Write bytes, whose last reply goes to settle. */
static void vkp_i_private_send(vkp_i_private *self, vkp_bytes bytes, uint32_t replies,
                               void (*settle)(vkp_i_request *request, vkp_status status,
                                              const vkp_value *value, const vkp_bytes *frame))
{
    memset(&self->carry, 0, sizeof self->carry);
    self->carry.due = replies;
    self->carry.bytes = bytes;
    self->carry.settle = settle;
    if (!vkp_i_link_start(&self->link, &self->carry)) {
        vkp_bytes_unref(&self->carry.bytes);
        vkp_i_private_lost(self);
    }
}

static void vkp_i_private_write_ask(vkp_i_private *self)
{
    vkp_i_private_send(self, vkp_bytes_ref(&self->ask->request.bytes), self->ask->request.due,
                       vkp_i_private_settled);
}

/* Write the command that the connection carries, once it is ready; WAIT when the connection has
   caught up with what the client wrote.                                                       */
static void vkp_i_private_write(vkp_i_private *self)
{
    if (self->ask == NULL || self->link.stage != VKP_I_STAGE_READY) {
        return;
    }
    vkp_timer_stop(&self->timer);
    if (self->ask->waits) {
        vkp_i_private_send(self, vkp_bytes_static(vkp_i_catch_up, sizeof vkp_i_catch_up - 1), 1,
                           vkp_i_private_caught_up);
    } else {
        vkp_i_private_write_ask(self);
    }
}

/* The message before WAIT was answered. Where it is refused WAIT would wait for nothing: the
   refusal is its answer.                                                                      */
static void vkp_i_private_caught_up(vkp_i_request *request, vkp_status status,
                                    const vkp_value *value, const vkp_bytes *frame)
{
    if (status != VKP_OK || value->type == VKP_RESP_ERROR) {
        vkp_i_private_settled(request, status, value, frame);
    } else {
        vkp_i_private_write_ask(VKP_CONTAINER(request, vkp_i_private, carry));
    }
}

/* The command has its reply: the connection is free for the next one. */
static void vkp_i_private_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                                  const vkp_bytes *frame)
{
    vkp_i_private *self = VKP_CONTAINER(request, vkp_i_private, carry);
    vkp_client *client = self->client;
    vkp_i_ask *ask = self->ask;
    self->ask = NULL;
    if (!vkp_i_private_start_timer(self, VKP_I_PRIVATE_IDLE_MS)) {
        vkp_i_private_lost(self); /* without a timer it would be kept without end */
    }
    ask->request.settle(&ask->request, status, value, frame);
    if (!client->closed) {
        vkp_i_client_serve_waiting(client);
    }
}

static void vkp_i_private_on_ready(vkp_i_link *link)
{
    vkp_i_private_write(vkp_i_private_of(link));
}

static void vkp_i_private_on_push(vkp_i_link *link, const vkp_push *push)
{
    (void)link;
    (void)push;
}

static void vkp_i_private_on_down(vkp_i_link *link)
{
    vkp_i_private_lost(vkp_i_private_of(link));
}

static void vkp_i_private_on_busy(vkp_i_link *link)
{
    (void)link;
}

static const vkp_i_link_ops vkp_i_private_ops = {vkp_i_private_on_ready,
                                                 vkp_i_private_on_push,
                                                 vkp_i_private_on_down,
                                                 vkp_i_private_on_busy,
                                                 NULL,
                                                 NULL,
                                                 vkp_i_private_hold,
                                                 vkp_i_private_release,
                                                 NULL};

/* The try to connect, or the time without a command, is over. */
static void vkp_i_private_on_timer(vkp_timer *timer)
{
    vkp_i_private_lost(VKP_CONTAINER(timer, vkp_i_private, timer));
}

/* Open one more connection for the command. False: it cannot be opened; the ask is the caller's. */
static bool vkp_i_private_open(vkp_client *client, vkp_i_ask *ask)
{
    vkp_i_private *self = (vkp_i_private *)vkp_i_alloc_zero(client->env, sizeof *self);
    vkp_i_requests none;
    if (self == NULL) {
        return false;
    }
    self->client = client;
    self->refs = 1;
    self->next = client->privates;
    client->privates = self;
    client->private_count++;
    (void)VKP_I_ADD(&client->refs, 1);
    if (vkp_i_link_init(&self->link, client->env, client->loop, &client->config,
                        &vkp_i_private_ops) != VKP_OK ||
        !vkp_i_private_start_timer(self, client->config.connect_timeout_ms) ||
        !vkp_i_client_aim(client) ||
        vkp_i_link_connect(&self->link, client->target.address, client->target.username,
                           client->target.password) != VKP_OK) {
        vkp_i_requests_init(&none);
        vkp_i_private_end(self, &none);
        return false;
    }
    self->ask = ask;
    return true;
}

/* Carry a blocking command on a connection of its own, or let it wait for one. */
static void vkp_i_client_carry(vkp_client *client, vkp_i_ask *ask)
{
    vkp_i_private *self = client->privates;
    while (self != NULL && (self->ask != NULL || self->link.stage != VKP_I_STAGE_READY)) {
        self = self->next;
    }
    if (self != NULL) {
        self->ask = ask;
        vkp_i_private_write(self);
    } else if (client->private_count >= client->config.private_max) {
        vkp_i_requests_append(&client->waiting, &ask->request);
    } else if (!vkp_i_private_open(client, ask)) {
        ask->request.settle(&ask->request, VKP_ERR_DISCONNECTED, NULL, NULL);
    }
}

/* A message on the shared connection: its answer means that the commands before it are executed. */
typedef struct vkp_i_turn {
    vkp_i_request request;
    vkp_client *client; /* no reference: the link settles all requests before the client ends */
    vkp_i_ask *ask;     /* what waits for that */
} vkp_i_turn;

static void vkp_i_turn_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                               const vkp_bytes *frame)
{
    vkp_i_turn *turn = VKP_CONTAINER(request, vkp_i_turn, request);
    vkp_client *client = turn->client;
    vkp_i_ask *ask = turn->ask;
    (void)value;
    (void)frame;
    vkp_bytes_unref(&request->bytes);
    vkp_i_free(client->env, turn, sizeof *turn);
    if (status == VKP_OK) {
        vkp_i_client_carry(client, ask);
    } else {
        ask->request.settle(&ask->request, status, NULL, NULL);
    }
}

/* Carry WAIT or WAITAOF when the client's earlier commands are executed. */
static void vkp_i_client_carry_behind(vkp_client *client, vkp_i_ask *ask)
{
    vkp_i_turn *turn = (vkp_i_turn *)vkp_i_alloc_zero(client->env, sizeof *turn);
    if (turn != NULL) {
        turn->client = client;
        turn->ask = ask;
        turn->request.due = 1;
        turn->request.settle = vkp_i_turn_settled;
        turn->request.bytes = vkp_bytes_static(vkp_i_catch_up, sizeof vkp_i_catch_up - 1);
        if (vkp_i_link_start(&client->link, &turn->request)) {
            return;
        }
        vkp_i_free(client->env, turn, sizeof *turn);
    }
    ask->request.settle(&ask->request, VKP_ERR_DISCONNECTED, NULL, NULL);
}

/* Give waiting commands the connections that are free. */
static void vkp_i_client_serve_waiting(vkp_client *client)
{
    vkp_i_requests waiting;
    vkp_i_request *request;
    vkp_i_requests_init(&waiting);
    vkp_i_requests_move(&client->waiting, &waiting);
    while ((request = vkp_i_requests_pop(&waiting)) != NULL) {
        vkp_i_client_carry(client, VKP_CONTAINER(request, vkp_i_ask, request));
    }
}

/* Whether nobody waits for the reply any longer. */
static bool vkp_i_ask_is_given_up(vkp_i_ask *ask)
{
    bool given_up;
    VKP_I_LOCK(&ask->client->mutex);
    given_up = ask->slot == NULL && ask->on_reply == NULL;
    VKP_I_UNLOCK(&ask->client->mutex);
    return given_up;
}

/* End the connections whose commands were given up, and forget such commands that wait. */
static void vkp_i_client_sweep_privates(vkp_client *client)
{
    vkp_i_requests given_up;
    vkp_i_requests waiting;
    vkp_i_request *request;
    vkp_i_private *self = client->privates;
    vkp_i_requests_init(&given_up);
    vkp_i_requests_init(&waiting);
    while (self != NULL) {
        vkp_i_private *next = self->next;
        if (self->ask != NULL && vkp_i_ask_is_given_up(self->ask)) {
            vkp_i_private_end(self, &given_up);
        }
        self = next;
    }
    vkp_i_requests_move(&client->waiting, &waiting);
    while ((request = vkp_i_requests_pop(&waiting)) != NULL) {
        bool gone = vkp_i_ask_is_given_up(VKP_CONTAINER(request, vkp_i_ask, request));
        vkp_i_requests_append(gone ? &given_up : &client->waiting, request);
    }
    while ((request = vkp_i_requests_pop(&given_up)) != NULL) {
        request->settle(request, VKP_ERR_CLOSED, NULL, NULL); /* calls nobody */
    }
    vkp_i_client_serve_waiting(client);
}

/* The client is closed: all commands on connections of their own, or waiting for one, fail. */
static void vkp_i_client_end_privates(vkp_client *client)
{
    while (client->privates != NULL) {
        vkp_i_private_end(client->privates, &client->failed);
    }
    vkp_i_requests_move(&client->waiting, &client->failed);
}

#endif /* VKP_I_IO */
