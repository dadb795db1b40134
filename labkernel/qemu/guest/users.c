/* Users and groups by the image's own etc/passwd and etc/group. */
#include "guest.h"

static int split_line(char *line, char **fields, int wanted)
{
    int count = 0;
    line[strcspn(line, "\n")] = 0;
    while (count < wanted) {
        fields[count++] = line;
        line = strchr(line, ':');
        if (!line)
            break;
        *line++ = 0;
    }
    return count;
}

int as_number(const char *text, unsigned *value)
{
    char *rest;
    unsigned long number = strtoul(text, &rest, 10);
    if (!*text || *rest || number > 0x7fffffff)
        return 0;
    *value = (unsigned)number;
    return 1;
}

/* getpwnam of a static libc reads nsswitch.conf and wants shared objects; the two files are easy to read. */
static int look_up_user(const char *name, struct identity *who, char *login, size_t login_size)
{
    char line[1024], *field[7];
    unsigned number = 0, uid, gid;
    int numeric = as_number(name, &number), found = 0;
    FILE *file = fopen("/etc/passwd", "re");
    while (file && !found && fgets(line, sizeof line, file)) {
        if (split_line(line, field, 7) < 6 || !as_number(field[2], &uid) || !as_number(field[3], &gid))
            continue;
        if (!strcmp(field[0], name) || (numeric && uid == number)) {
            who->uid = uid;
            who->gid = gid;
            snprintf(who->home, sizeof who->home, "%s", field[5]);
            snprintf(login, login_size, "%s", field[0]);
            found = 1;
        }
    }
    if (file)
        fclose(file);
    if (!found && numeric) {
        who->uid = number;
        who->gid = 0;
        found = 1;
    }
    return found;
}

static int member_of(const char *members, const char *login)
{
    size_t len = strlen(login);
    for (const char *at = members; len && at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, login, len) && (at[len] == ',' || at[len] == 0))
            return 1;
    return 0;
}

static int look_up_groups(const char *wanted, const char *login, struct identity *who)
{
    char line[4096], *field[4];
    unsigned gid, number = 0;
    int numeric = wanted && as_number(wanted, &number), found = !wanted;
    FILE *file = fopen("/etc/group", "re");
    while (file && fgets(line, sizeof line, file)) {
        int count = split_line(line, field, 4);
        if (count < 3 || !as_number(field[2], &gid))
            continue;
        if (wanted && !strcmp(field[0], wanted)) {
            who->gid = gid;
            found = 1;
        }
        /* as docker does: supplementary groups only where no group was asked for */
        if (!wanted && count == 4 && who->group_count < MAX_GROUPS && member_of(field[3], login))
            who->groups[who->group_count++] = gid;
    }
    if (file)
        fclose(file);
    if (!found && numeric) {
        who->gid = number;
        found = 1;
    }
    return found;
}

const char *resolve_user(char *user, struct identity *who)
{
    static char problem[300];
    char login[256] = "";
    char *group = strchr(user, ':');
    if (group)
        *group++ = 0;
    if (!look_up_user(*user ? user : "0", who, login, sizeof login)) {
        snprintf(problem, sizeof problem, "unable to find user %s: no matching entries in passwd file", user);
        return problem;
    }
    if (!look_up_groups(group && *group ? group : NULL, login, who)) {
        snprintf(problem, sizeof problem, "unable to find group %s: no matching entries in group file", group);
        return problem;
    }
    return NULL;
}
