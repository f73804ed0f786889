/* Runs the models: all of them within their bounds, then further while there is time; or with
   faults that they have to notice.                                                            */
#include "families.h"
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MODELS 8000
#define MOST_PREEMPTIONS 4 /* of any model in its ordinary run */

static const struct model_family families[] = {
    {.name = "checker", .prefixes = "", .add = checker_models, .models = 24, .executions = 15000},
    {.name = "parker",
     .prefixes = "vkp_i_os_park vkp_i_os_unpark vkp_i_parker_ ",
     .add = parker_models,
     .models = 6,
     .executions = 5000},
    {.name = "mpsc",
     .prefixes = "vkp_mpsc_ vkp_i_mpsc_ vkp_i_lane_ vkp_i_channel_ vkp_i_flag_ vkp_i_sender_ ",
     .add = mpsc_models,
     .models = 2900,
     .executions = 14000000,
     .sleeps = true,
     .barriers = true,
     .locks = true,
     .releases = true},
    {.name = "oneshot",
     .prefixes = "vkp_oneshot_ vkp_i_oneshot_ vkp_i_slot_ ",
     .add = oneshot_models,
     .models = 130,
     .executions = 2000000,
     .sleeps = true,
     .releases = true},
    {.name = "cancel",
     .prefixes = "vkp_cancel_ vkp_i_cancel_ ",
     .add = cancel_models,
     .models = 120,
     .executions = 400000,
     .sleeps = true,
     .locks = true},
    {.name = "broadcast",
     .prefixes = "vkp_broadcast_ vkp_i_broadcast_ vkp_i_receivers_ vkp_i_flag_ ",
     .add = broadcast_models,
     .models = 380,
     .executions = 1200000,
     .sleeps = true,
     .barriers = true,
     .locks = true,
     .releases = true},
    {.name = "watch",
     .prefixes = "vkp_watch_ vkp_i_watch_ vkp_i_receivers_ vkp_i_flag_ ",
     .add = watch_models,
     .models = 300,
     .executions = 1500000,
     .sleeps = true,
     .barriers = true,
     .locks = true,
     .releases = true},
    {.name = "select",
     .prefixes = "vkp_select vkp_i_select vkp_i_case",
     .add = select_models,
     .models = 200,
     .executions = 400000,
     .sleeps = true},
    {.name = "socket",
     .prefixes = "vkp_socket_ vkp_registry_ vkp_i_socket_ vkp_i_registry_ vkp_i_map_ vkp_i_latch_ ",
     .add = socket_models,
     .models = 320,
     .executions = 700000,
     .releases = true},
};
#define FAMILIES (sizeof families / sizeof *families)

struct entry {
    struct model model;
    const struct model_family *family;
    uint64_t executions; /* in the last complete run */
};

static struct entry models[MODELS];
static unsigned models_count;
static const struct model_family *family_now;
static const char *only = "";

/* The sites of the header and of the parker, from the linker's section. */
extern struct model_site *const __start_model_sites[];
extern struct model_site *const __stop_model_sites[];
#define SITES ((size_t)(__stop_model_sites - __start_model_sites))

double model_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void model_add(const struct model *model)
{
    if (strstr(model->name, only) == NULL) {
        return;
    }
    if (models_count == MODELS) {
        fprintf(stderr, "more than %d models\n", MODELS);
        exit(2);
    }
    models[models_count].model = *model;
    models[models_count].family = family_now;
    models_count++;
}

/* ---- the ordinary run ---- */

/* A model of the checker itself: does it see what it has to see, and nothing else? */
static bool as_expected(const struct model *model, enum model_verdict verdict)
{
    if (model->fails != NULL && verdict == MODEL_PASSED) {
        printf("%s FAILED: it passed\n", model->name);
        return false;
    }
    if (model->fails != NULL && strncmp(model_failure(), model->fails, strlen(model->fails)) != 0) {
        printf("%s FAILED: %s\n", model->name, model_failure());
        return false;
    }
    if (model->outcomes != 0 && model_outcomes() != model->outcomes) {
        printf("%s FAILED: outcomes %#llx instead of %#llx\n", model->name,
               (unsigned long long)model_outcomes(), (unsigned long long)model->outcomes);
        return false;
    }
    return true;
}

static bool run_all(unsigned more, double until, bool print, uint64_t *total)
{
    unsigned i;
    for (i = 0; i < models_count; i++) {
        struct entry *each = &models[i];
        unsigned preemptions = each->model.preemptions + more;
        enum model_verdict verdict;
        uint64_t executions;
        double begin = model_seconds();
        verdict = model_check(&each->model, 0, preemptions, each->model.stale + more / 2, until,
                              false, &executions);
        if (verdict == MODEL_FAILED && each->model.fails == NULL) {
            model_print_failure();
            return false;
        }
        if (verdict != MODEL_UNFINISHED && !as_expected(&each->model, verdict)) {
            return false;
        }
        if (verdict == MODEL_UNFINISHED) {
            *total += executions;
            return true;
        }
        each->executions = executions;
        *total += executions;
        if (print) {
            printf("model %-56s bound %u,%u: %9llu executions, %.2f s\n", each->model.name,
                   preemptions, each->model.stale + more / 2, (unsigned long long)executions,
                   model_seconds() - begin);
        }
    }
    return true;
}

static bool check_totals(void)
{
    bool enough = true;
    size_t f;
    for (f = 0; f < FAMILIES; f++) {
        uint64_t executions = 0;
        unsigned count = 0;
        unsigned i;
        for (i = 0; i < models_count; i++) {
            if (models[i].family == &families[f]) {
                executions += models[i].executions;
                count++;
                if (models[i].executions < 2 && models[i].model.fails == NULL) {
                    printf("model.%s: %s has one execution only\n", families[f].name,
                           models[i].model.name);
                    enough = false;
                }
            }
        }
        printf("model.%s: %u models, %llu executions\n", families[f].name, count,
               (unsigned long long)executions);
        if (only[0] == '\0' &&
            (count < families[f].models || executions < families[f].executions)) {
            printf("model.%s: at least %u models and %llu executions are due\n", families[f].name,
                   families[f].models, (unsigned long long)families[f].executions);
            enough = false;
        }
    }
    return enough;
}

/* ---- mutants ---- */

static bool belongs(const struct model_family *family, const struct model_site *site)
{
    const char *prefix = family->prefixes;
    while (*prefix != '\0') {
        size_t length = strcspn(prefix, " ");
        if (strncmp(site->function, prefix, length) == 0) {
            return true;
        }
        prefix += length + (prefix[length] != '\0');
    }
    return false;
}

/* The models of a family (NULL: of all), of those marked if there is a list, until one fails: its
   name, or NULL. Small bounds first, as most faults show there.                                */
static const char *killer(const struct model_family *family, const uint8_t *marked, unsigned most)
{
    unsigned bound;
    for (bound = 0; bound <= most; bound++) {
        unsigned i;
        for (i = 0; i < models_count; i++) {
            const struct model *model = &models[i].model;
            uint64_t executions;
            if ((family == NULL || models[i].family == family) &&
                (marked == NULL || marked[i] != 0) && bound <= model->preemptions &&
                model_check(model, bound, bound, model->stale, 1e18, true, &executions) ==
                    MODEL_FAILED) {
                return model->name;
            }
        }
    }
    return NULL;
}

static bool must_die(const struct model_family *family, const char *fault)
{
    const char *by = killer(family, NULL, MOST_PREEMPTIONS);
    size_t i;
    if (by != NULL) {
        printf("mutant %s, %s: caught by %s (%s)\n", family->name, fault, by, model_failure());
    } else {
        printf("mutant %s, %s: NOT CAUGHT\n", family->name, fault);
    }
    fflush(stdout);
    model_lost_unpark = 0;
    model_empty_barrier = false;
    for (i = 0; i < SITES; i++) {
        __start_model_sites[i]->order = __start_model_sites[i]->written;
    }
    return by != NULL;
}

/* Take `bits` from the orders of the family's sites, of locks or of atomics. */
static void weaken(const struct model_family *family, unsigned bits)
{
    size_t i;
    for (i = 0; i < SITES; i++) {
        struct model_site *site = __start_model_sites[i];
        if (belongs(family, site)) {
            site->order &= ~bits;
        }
    }
}

/* The faults that each family has to notice, whatever its code looks like. */
static bool run_mutants(void)
{
    bool all = true;
    size_t f;
    unsigned i;
    for (f = 0; f < FAMILIES; f++) {
        const struct model_family *family = &families[f];
        for (i = 0; i < models_count && models[i].family != family; i++) {
        }
        if (i == models_count) {
            continue; /* not asked for */
        }
        if (family->sleeps) {
            model_lost_unpark = 1;
            all = must_die(family, "an unpark is lost") && all;
        }
        if (family->barriers) {
            model_empty_barrier = true;
            all = must_die(family, "membarrier does nothing") && all;
        }
        if (family->releases) {
            weaken(family, MODEL_RELEASE);
            all = must_die(family, "no release") && all;
            weaken(family, MODEL_ACQUIRE);
            all = must_die(family, "no acquire") && all;
        }
        if (family->locks) {
            weaken(family, MODEL_LOCK);
            all = must_die(family, "no locks") && all;
        }
    }
    return all;
}

/* A fault in the text of the header, put there before the build. */
static bool run_seeded(const char *fault)
{
    return models_count > 0 && must_die(models[0].family, fault);
}

static const char *order_name(const struct model_site *site, unsigned order)
{
    static const char *const names[8] = {"relaxed", "acquire", "release", "acq_rel",
                                         "seq",     "seq",     "seq",     "seq"};
    return site->written == MODEL_LOCK ? "no lock" : names[order & 7];
}

/* The orders one step below what the header asks for. */
static unsigned weaker(const struct model_site *site, unsigned out[2])
{
    unsigned order = site->written;
    if (order == MODEL_LOCK) {
        out[0] = 0;
        return strcmp(site->what, "LOCK") == 0;
    }
    if ((order & MODEL_SEQ) != 0) {
        out[0] = order & ~MODEL_SEQ;
        return 1;
    }
    if (order == MODEL_ACQ_REL) {
        out[0] = MODEL_ACQUIRE;
        out[1] = MODEL_RELEASE;
        return 2;
    }
    out[0] = MODEL_RELAXED;
    return order != MODEL_RELAXED;
}

/* Weaken each site in turn, and leave out each lock, with up to `most` preemptions: what no model
   notices is stronger than it has to be, or beyond the bounds or the models.                  */
static bool run_sweep(const char *function, unsigned most)
{
    uint8_t *reached = calloc(SITES, MODELS);
    unsigned caught = 0;
    unsigned survived = 0;
    unsigned unreached = 0;
    unsigned i;
    size_t s;
    if (reached == NULL) {
        return false;
    }
    for (i = 0; i < models_count; i++) {
        uint64_t executions;
        bool sound;
        for (s = 0; s < SITES; s++) {
            __start_model_sites[s]->hits = 0;
        }
        sound = models[i].model.fails == NULL &&
                model_check(&models[i].model, 1, 1, 1, 1e18, false, &executions) == MODEL_PASSED;
        for (s = 0; s < SITES; s++) {
            reached[s * MODELS + i] = sound && __start_model_sites[s]->hits > 0;
        }
    }
    for (s = 0; s < SITES; s++) {
        struct model_site *site = __start_model_sites[s];
        unsigned orders[2] = {0, 0};
        unsigned count = weaker(site, orders);
        unsigned k;
        if (strncmp(site->function, function, strlen(function)) != 0) {
            continue;
        }
        for (k = 0; k < count; k++) {
            bool any = memchr(&reached[s * MODELS], 1, MODELS) != NULL;
            const char *by;
            site->order = orders[k];
            by = any ? killer(NULL, &reached[s * MODELS], most) : NULL;
            site->order = site->written;
            caught += by != NULL;
            survived += by == NULL && any;
            unreached += !any;
            printf("site %-32s %5d  %-11s to %-8s %s%s\n", site->function, site->line, site->what,
                   order_name(site, orders[k]),
                   by != NULL ? "caught by "
                   : any      ? "SURVIVED"
                              : "not reached",
                   by != NULL ? by : "");
            fflush(stdout);
        }
    }
    free(reached);
    printf("sweep: %u caught, %u survived, %u not reached\n", caught, survived, unreached);
    return true;
}

static int usage(void)
{
    fputs(
        "model [--only PART-OF-NAMES] [--more N] [--minutes N]\n"
        "  every model within its bounds; N preemptions more; further ones for N minutes in all\n"
        "model [--only PART-OF-NAMES] --mutants | --sweep BEGINNING-OF-FUNCTIONS [--more N]\n"
        "  with faults: those that must be noticed; or each order of the header weakened in turn,\n"
        "  with one preemption, or N more\n"
        "model --only PART-OF-NAMES --seeded FAULT\n"
        "  built with a fault in the header, which those models must notice\n",
        stderr);
    return 2;
}

int main(int argc, char **argv)
{
    double begin = model_seconds();
    double minutes = 0;
    unsigned more = 0;
    bool mutants = false;
    const char *sweep = NULL;
    const char *seeded = NULL;
    uint64_t total = 0;
    size_t f;
    int i;
    for (i = 1; i < argc; i++) {
        bool has_value = i + 1 < argc;
        if (strcmp(argv[i], "--mutants") == 0) {
            mutants = true;
        } else if (strcmp(argv[i], "--sweep") == 0 && has_value) {
            sweep = argv[++i];
        } else if (strcmp(argv[i], "--seeded") == 0 && has_value) {
            seeded = argv[++i];
        } else if (strcmp(argv[i], "--only") == 0 && has_value) {
            only = argv[++i];
        } else if (strcmp(argv[i], "--minutes") == 0 && has_value) {
            minutes = atof(argv[++i]);
        } else if (strcmp(argv[i], "--more") == 0 && has_value) {
            more = (unsigned)atoi(argv[++i]);
        } else {
            return usage();
        }
    }
    for (f = 0; f < FAMILIES; f++) {
        family_now = &families[f];
        families[f].add();
    }
    model_prepare();
    if (seeded != NULL) {
        return run_seeded(seeded) ? 0 : 1;
    }
    if (mutants || sweep != NULL) {
        return (mutants ? run_mutants() : run_sweep(sweep, 1 + more)) ? 0 : 1;
    }
    if (!run_all(more, 1e18, true, &total) || !check_totals()) {
        return 1;
    }
    while (model_seconds() < begin + minutes * 60) {
        more++;
        if (!run_all(more, begin + minutes * 60, true, &total)) {
            return 1;
        }
    }
    printf("model: %u models, %llu executions in %.0f s\n", models_count, (unsigned long long)total,
           model_seconds() - begin);
    return 0;
}
