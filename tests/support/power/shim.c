/* What a power cut leaves of a directory: preloaded into a process, this copies a file of $POWER_DATA to $POWER_SHADOW
   whenever it was flushed. A copy takes its place in one step, before the flush returns, so that the shadow is at every
   moment what a disk holds that has kept nothing but what was asked of it. A file that was removed or renamed is so in
   the shadow when the directory was flushed; also one that was renamed by a system call of the program's own, which is
   found by its inode. While there is a file $POWER_FAILS, every flush fails. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

/* A harness that forgets a file would find losses that there are not, or none. */
static void give_up(const char *why)
{
    fprintf(stderr, "power: %s\n", why);
    abort();
}

static void copy(int from, int to)
{
    static char piece[1 << 16];
    off_t at = 0;
    ssize_t len;
    while ((len = pread(from, piece, sizeof piece, at)) > 0) {
        for (ssize_t done = 0; done < len;) {
            ssize_t more = write(to, piece + done, len - done);
            if (more <= 0)
                give_up("cannot write a copy");
            done += more;
        }
        at += len;
    }
    if (len < 0)
        give_up("cannot read a flushed file");
}

/* What was done to the names of the directory and is not flushed; `to` is empty where a file was removed. */
static struct {
    char from[256], to[256];
} pending[64];
static int pending_len;

/* The name in the directory, or null if the path is of somewhere else. */
static const char *name_of(const char *path)
{
    const char *data = getenv("POWER_DATA");
    if (!data || !getenv("POWER_SHADOW"))
        give_up("POWER_DATA and POWER_SHADOW are needed");
    size_t head = strlen(data);
    if (strncmp(path, data, head) || path[head] != '/' || strchr(path + head + 1, '/') || strlen(path + head) > 255)
        return 0;
    return path + head + 1;
}

static void in_shadow(char *path, size_t len, const char *name)
{
    snprintf(path, len, "%s/%s", getenv("POWER_SHADOW"), name);
}

/* With no `to`, a file was removed. */
static void note(const char *from, const char *to)
{
    const int is_removed = !to;
    from = name_of(from);
    to = is_removed ? "" : name_of(to);
    if (!from && (is_removed || !to))
        return;
    if (!from || !to)
        give_up("a file that moves in or out of the directory is not modelled");
    pthread_mutex_lock(&one_at_a_time);
    if (pending_len == 64)
        give_up("too much was done to the directory before it was flushed");
    strcpy(pending[pending_len].from, from);
    strcpy(pending[pending_len++].to, to);
    pthread_mutex_unlock(&one_at_a_time);
}

/* The files in the shadow that this process has flushed, by inode; their names there. */
static struct {
    ino_t inode;
    char name[256];
} known[64];
static int known_len;

static void know(ino_t inode, const char *name)
{
    int at = 0;
    while (at < known_len && known[at].inode != inode && strcmp(known[at].name, name))
        at++;
    if (at == 64)
        give_up("too many files were flushed");
    known_len += at == known_len;
    known[at].inode = inode;
    strcpy(known[at].name, name);
}

/* Under which name the directory has this file now. */
static int find(ino_t inode, char *name)
{
    DIR *dir = opendir(getenv("POWER_DATA"));
    struct dirent *entry;
    if (!dir)
        give_up("cannot read the directory");
    while ((entry = readdir(dir)))
        if (entry->d_ino == inode && strlen(entry->d_name) < 256) {
            strcpy(name, entry->d_name);
            break;
        }
    closedir(dir);
    return !!entry;
}

static void keep_names(void)
{
    char from[8192], to[8192], name[256];
    for (int i = 0; i < pending_len; i++) {
        in_shadow(from, sizeof from, pending[i].from);
        in_shadow(to, sizeof to, pending[i].to);
        /* What was never flushed is in the shadow under no name. */
        if (pending[i].to[0])
            syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
        else if (pending[i].from[0])
            syscall(SYS_unlinkat, AT_FDCWD, from, 0);
    }
    for (int i = 0; i < pending_len; i++)
        for (int k = 0; k < known_len; k++)
            if (!strcmp(known[k].name, pending[i].from)) {
                if (pending[i].to[0])
                    strcpy(known[k].name, pending[i].to);
                else
                    known[k].name[0] = known[k].inode = 0;
            }
    pending_len = 0;
    for (int k = 0; k < known_len; k++)
        if (known[k].inode && find(known[k].inode, name) && strcmp(known[k].name, name)) {
            in_shadow(from, sizeof from, known[k].name);
            in_shadow(to, sizeof to, name);
            syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
            strcpy(known[k].name, name);
        }
}

static void keep(int fd)
{
    char link[64], path[4096], kept[8192], part[8200];
    struct stat status;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof path - 1);
    if (len < 0 || fstat(fd, &status))
        give_up("cannot tell which file was flushed");
    path[len] = 0;
    if (S_ISDIR(status.st_mode) && !strcmp(path, getenv("POWER_DATA") ? getenv("POWER_DATA") : ""))
        keep_names();
    const char *name = name_of(path);
    if (!S_ISREG(status.st_mode) || !name)
        return;
    /* A new file under the name of one that was removed. */
    for (int i = 0; i < pending_len; i++)
        if (!pending[i].to[0] && !strcmp(pending[i].from, name))
            pending[i].from[0] = 0;
    in_shadow(kept, sizeof kept, name);
    snprintf(part, sizeof part, "%s.part", kept);
    int from = open(link, O_RDONLY | O_CLOEXEC);
    int to = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (from < 0 || to < 0)
        give_up("cannot copy a flushed file");
    copy(from, to);
    close(from);
    if (close(to) || syscall(SYS_renameat, AT_FDCWD, part, AT_FDCWD, kept))
        give_up("cannot keep a copy");
    know(status.st_ino, name);
}

static int flush(const char *name, int fd)
{
    const char *fails = getenv("POWER_FAILS");
    if (fails && !syscall(SYS_faccessat, AT_FDCWD, fails, F_OK)) {
        errno = EIO;
        return -1;
    }
    int (*system_flush)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    if (!system_flush)
        give_up("no flush to stand in for");
    /* What comes into the file meanwhile need not be kept, but what came before must. */
    int failed = system_flush(fd);
    if (!failed) {
        pthread_mutex_lock(&one_at_a_time);
        keep(fd);
        pthread_mutex_unlock(&one_at_a_time);
    }
    return failed;
}

int fsync(int fd)
{
    return flush("fsync", fd);
}

int fdatasync(int fd)
{
    return flush("fdatasync", fd);
}

int unlink(const char *path)
{
    int failed = (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (!failed)
        note(path, 0);
    return failed;
}

int rename(const char *from, const char *to)
{
    int failed = (int)syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
    if (!failed)
        note(from, to);
    return failed;
}

/* Other ways to flush would pass by unseen. */
int msync(void *address, size_t length, int flags)
{
    (void)address, (void)length, (void)flags;
    give_up("msync is not modelled");
    return -1;
}

int sync_file_range(int fd, off64_t offset, off64_t count, unsigned int flags)
{
    (void)fd, (void)offset, (void)count, (void)flags;
    give_up("sync_file_range is not modelled");
    return -1;
}
