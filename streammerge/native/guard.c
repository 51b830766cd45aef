/* Copying from a mapping of a file that may become shorter: see streammerge/checkpoint/bytesource.py.
 *
 * A page of a mapping that lies behind the end of its file, or that the disk cannot read, ends the
 * process with SIGBUS. While a mapping is open, a handler of ours ends only the copy. The signal goes to
 * the thread that touched the page, so what belongs to a copy is kept per thread. Any other SIGBUS is
 * handed to whoever handled it before.
 */
#ifdef _WIN32
/* Windows has no SIGBUS: there files are read, never mapped, and what is declared here is never called. */
#include <stdint.h>
#include <string.h>

int32_t sm_guard_begin(void) { return -1; }
void sm_guard_end(void) {}
int64_t sm_copy_mapped(char *to, const char *from, int64_t nbytes) {
    memcpy(to, from, (size_t)nbytes);
    return nbytes;
}
#else
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

/* A fault tells only that a piece was not copied whole, so pieces are no larger than a page. */
enum { PIECE = 4096 };

typedef struct {
    sigjmp_buf back;
    const char *begin;
    const char *end;
} copying;

static _Thread_local copying *volatile current;
static struct sigaction before;

static void on_sigbus(int number, siginfo_t *said, void *context) {
    copying *mine = current;
    const char *touched = said->si_addr;
    int is_fault = said->si_code > 0; /* not sent by a process */
    if (is_fault && mine && touched >= mine->begin && touched < mine->end)
        siglongjmp(mine->back, 1);
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, said, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else if (is_fault) {
        /* The access is tried again when this returns, and does what it would have done. */
        sigaction(number, &before, NULL);
    } else if (before.sa_handler == SIG_DFL) {
        sigaction(number, &before, NULL);
        raise(number);
    }
}

/* Begins to guard. Returns 0, or -1 if the system refuses. */
int32_t sm_guard_begin(void) {
    struct sigaction ours;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_sigbus;
    /* Whoever handled it before may count on its own stack. */
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, &before);
}

/* Ends guarding: puts back the handler of before, if ours is still there. Whoever came after us may
 * call ours, which hands on. */
void sm_guard_end(void) {
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO &&
        now.sa_sigaction == on_sigbus)
        sigaction(SIGBUS, &before, NULL);
}

/* Copies up to `nbytes` from a mapping, and returns how many were there. */
int64_t sm_copy_mapped(char *to, const char *from, int64_t nbytes) {
    copying mine;
    volatile int64_t done = 0;
    mine.begin = from;
    mine.end = from + nbytes;
    if (sigsetjmp(mine.back, 1) == 0) {
        /* The compiler must not move a copy past what says how far it came, or whose it is. */
        atomic_signal_fence(memory_order_seq_cst);
        current = &mine;
        while (done < nbytes) {
            /* Up to the end of a page first, so that a piece is in one page. */
            int64_t room = PIECE - (int64_t)((uintptr_t)(from + done) % PIECE);
            int64_t count = nbytes - done < room ? nbytes - done : room;
            atomic_signal_fence(memory_order_seq_cst);
            memcpy(to + done, from + done, (size_t)count);
            atomic_signal_fence(memory_order_seq_cst);
            done += count;
        }
    }
    current = NULL;
    return done;
}
#endif
