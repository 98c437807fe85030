// Counts what a process does to the files below one directory, and at the N-th of these events kills it, sends it a
// signal, or lets the call fail. Loaded by LD_PRELOAD, so that Python's and Rust's calls are seen alike; asleep until
// `arm` is called.
//
// Not seen: renames that Rust makes by a system call of its own, as safetensors does in a directory that is hidden still.
//
// An event comes before its call. A write that is torn is half done when the process dies. A fault that lasts stays
// until the process ends, for the calls that such a fault concerns: a full disk still renames and removes.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, SIGNAL, FAIL };
enum { LOOK = 1, GROW = 2, CHANGE = 4 };  // what a call is: reading, needing space, anything else that writes

static char root[PATH_MAX];
static size_t root_length;
static long at, counted;
static int action, number, lasting, log_fd = -1;
static int concerned;  // the kinds that are counted and may fail

// `number_`: of the signal, or the errno. `log`: a file for a line an event, or "".
void arm(const char *root_, long at_, int action_, int number_, int lasting_, int concerned_, const char *log) {
  snprintf(root, sizeof root, "%s", root_);
  root_length = strlen(root);
  at = at_, action = action_, number = number_, lasting = lasting_, concerned = concerned_;
  counted = 0;
  log_fd = *log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
}

// A signal once this process has used so much of the processors: a moment of its own, however busy the machine is.
int signal_after(double seconds, int signal_number) {
  struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = signal_number};
  struct itimerspec when = {.it_value = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9) + 1}};
  timer_t timer;
  return timer_create(CLOCK_PROCESS_CPUTIME_ID, &event, &timer) || timer_settime(timer, 0, &when, NULL);
}

static int below(const char *path) {
  return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void name_of_fd(int fd, char *name) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, name, PATH_MAX - 1);
  name[length < 0 ? 0 : length] = 0;
}

static void absolute(int directory, const char *path, char *name) {
  char start[PATH_MAX] = "";
  if (path[0] != '/') {
    if (directory == AT_FDCWD) {
      if (!getcwd(start, sizeof start)) start[0] = 0;
    } else {
      name_of_fd(directory, start);
    }
    strncat(start, "/", sizeof start - strlen(start) - 1);
  }
  snprintf(name, PATH_MAX, "%s%s", start, path);
}

// 0: the call may be made; 1: it fails, errno is set; 2: it is torn.
static int event(const char *call, const char *name, int kind) {
  if (!root_length || !(kind & concerned) || !below(name)) return 0;
  long now = ++counted;
  if (log_fd >= 0) dprintf(log_fd, "%d %s %s\n", kind, call, name + root_length);
  if (now != at && !(lasting && at && now > at)) return 0;
  if (action == KILL || (action == TEAR && strncmp(call, "write", 5))) {
    kill(getpid(), SIGKILL);
    pause();
  }
  if (action == TEAR) return 2;
  if (action == SIGNAL) raise(number);
  if (action != FAIL) return 0;
  errno = number;
  return 1;
}

static int at_path(const char *call, int directory, const char *path, int kind) {
  char name[PATH_MAX];
  if (!root_length || !path) return 0;
  absolute(directory, path, name);
  return event(call, name, kind);
}

static int at_fd(const char *call, int fd, int kind) {
  char name[PATH_MAX];
  if (!root_length || fd == log_fd) return 0;
  name_of_fd(fd, name);
  return event(call, name, kind);
}

#define REAL(type, name, ...)                                        \
  static type (*real)(__VA_ARGS__);                                  \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static int kind_of(int flags) {
  if (flags & O_CREAT) return GROW;
  return (flags & O_ACCMODE) == O_RDONLY ? LOOK : CHANGE;
}

#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    REAL(int, name, const char *, int, ...);                                   \
    va_list rest;                                                              \
    va_start(rest, flags);                                                     \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;    \
    va_end(rest);                                                              \
    if (at_path("open", AT_FDCWD, path, kind_of(flags))) return -1;            \
    return real(path, flags, mode);                                            \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                           \
  int name(int directory, const char *path, int flags, ...) {                  \
    REAL(int, name, int, const char *, int, ...);                              \
    va_list rest;                                                              \
    va_start(rest, flags);                                                     \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;    \
    va_end(rest);                                                              \
    if (at_path("open", directory, path, kind_of(flags))) return -1;           \
    return real(directory, path, flags, mode);                                 \
  }
OPENAT(openat)
OPENAT(openat64)

FILE *fopen64(const char *path, const char *mode) {
  REAL(FILE *, fopen64, const char *, const char *);
  return at_path("open", AT_FDCWD, path, *mode == 'r' ? LOOK : GROW) ? NULL : real(path, mode);
}

DIR *opendir(const char *path) {
  REAL(DIR *, opendir, const char *);
  return at_path("opendir", AT_FDCWD, path, LOOK) ? NULL : real(path);
}

ssize_t write(int fd, const void *from, size_t count) {
  REAL(ssize_t, write, int, const void *, size_t);
  int found = at_fd("write", fd, GROW);
  if (found == 1) return -1;
  if (found == 2) {
    real(fd, from, count / 2);
    kill(getpid(), SIGKILL);
    pause();
  }
  return real(fd, from, count);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  int found = at_fd("writev", fd, GROW);
  if (found == 1) return -1;
  if (found == 2) {
    real(fd, parts, count / 2);
    kill(getpid(), SIGKILL);
    pause();
  }
  return real(fd, parts, count);
}

int fsync(int fd) {
  REAL(int, fsync, int);
  return at_fd("fsync", fd, CHANGE) ? -1 : real(fd);
}

int fdatasync(int fd) {
  REAL(int, fdatasync, int);
  return at_fd("fsync", fd, CHANGE) ? -1 : real(fd);
}

int ftruncate64(int fd, off64_t length) {
  REAL(int, ftruncate64, int, off64_t);
  return at_fd("truncate", fd, GROW) ? -1 : real(fd, length);
}

static void note_source(int directory, const char *path) {
  char name[PATH_MAX];
  if (log_fd < 0 || !root_length) return;
  absolute(directory, path, name);
  if (below(name)) dprintf(log_fd, "0 from %s\n", name + root_length);
}

int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  note_source(AT_FDCWD, from);
  return at_path("rename", AT_FDCWD, to, CHANGE) ? -1 : real(from, to);
}

int renameat(int from_directory, const char *from, int directory, const char *to) {
  REAL(int, renameat, int, const char *, int, const char *);
  note_source(from_directory, from);
  return at_path("rename", directory, to, CHANGE) ? -1 : real(from_directory, from, directory, to);
}

int renameat2(int from_directory, const char *from, int directory, const char *to, unsigned flags) {
  REAL(int, renameat2, int, const char *, int, const char *, unsigned);
  note_source(from_directory, from);
  return at_path("rename", directory, to, CHANGE) ? -1 : real(from_directory, from, directory, to, flags);
}

int unlink(const char *path) {
  REAL(int, unlink, const char *);
  return at_path("unlink", AT_FDCWD, path, CHANGE) ? -1 : real(path);
}

int unlinkat(int directory, const char *path, int flags) {
  REAL(int, unlinkat, int, const char *, int);
  return at_path("unlink", directory, path, CHANGE) ? -1 : real(directory, path, flags);
}

int rmdir(const char *path) {
  REAL(int, rmdir, const char *);
  return at_path("rmdir", AT_FDCWD, path, CHANGE) ? -1 : real(path);
}

int mkdir(const char *path, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  return at_path("mkdir", AT_FDCWD, path, GROW) ? -1 : real(path, mode);
}

int mkdirat(int directory, const char *path, mode_t mode) {
  REAL(int, mkdirat, int, const char *, mode_t);
  return at_path("mkdir", directory, path, GROW) ? -1 : real(directory, path, mode);
}
