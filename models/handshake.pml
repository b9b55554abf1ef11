/*
 * The attested handshake between two honest hosts, and an attacker who owns the network and much more.
 *
 * What is modelled
 *   ENDS sessions of the hosts A and B, each in either role, in any order and all at once, so that what one says can be used
 *   in another: old sessions too, since a session may just rest. Each has two rounds: the first, and a re-attestation.
 *   A session's channel leads to another session, or to the attacker. He carries, holds back and reorders; he answers any
 *   session in any name and dials any destination; in a channel that ends at him he says whatever he can make. What he
 *   says and is refused changes nothing for anybody else, so only what passes the checks is tried.
 *   He has: the private keys of all certificates (A's, B's, and that of his own enrolled host M); every nonce, seed and
 *   piece of evidence, from the moment at which it is made; M's root of trust, which quotes anything. After a first round he
 *   may take over an end with its channel, its keys and its enclave's memory; from then on that host's root of trust says so.
 *
 * What is assumed
 *   TLS 1.3: what an honest session hears in a channel that does not end at the attacker, the session at its other end said;
 *   two channels never have the same exporter. The roots of trust of A and B quote only what their own measured enclave asks
 *   for. A judge knows which root of trust belongs to which certificate. Hashes do not collide, nonces do not repeat. That an
 *   appraisal itself is right (signatures, logs, reference values) is tested elsewhere.
 *
 * What is not
 *   Enclaves that lie, messages cut or malformed (fuzzed), several handshakes in one channel, liveness: he can always stop us.
 *
 * The names of states, inputs, messages and of what is quoted are those of sealane.session.attestation and exchange; the
 * table is drawn from the code: handshake_table.pml, by tests/models/table.py. Each safeguard has a define that takes it
 * out. Some are second lines, which show only where the first is gone too; tests/models/test_handshake_model.py has, for each
 * safeguard, what falls without it.
 *   -DNO_exporter -DNO_role -DNO_peer_nonce -DNO_own_nonce -DNO_certificates -DNO_seed -DNO_migration -DNO_round_number
 *   -DNO_subject                    it is not in what is quoted (subject: VM and epoch; certificates: both)
 *   -DNO_HOST                       any enrolled host's root of trust will do for any certificate
 *   -DNO_SINGLE_USE                 a nonce may come a second time in a channel
 *   -DNO_LAST_WORD                  the source is content before M4, the destination before M3
 *   -DSECRET_WITHOUT_EXPORTER -DSECRET_WITHOUT_SOURCE_SEED -DSECRET_WITHOUT_DESTINATION_SEED
 *                                   the lanes' secret is made of the other two
 */
#include "handshake_table.pml"

#ifndef ENDS
#define ENDS 3
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#define SLOTS (ENDS + 1)
#define SAID (ENDS * ROUNDS + 1)

/* Hosts; also their certificates, and their roots of trust. */
#define A 1
#define B 2
#define M 3
#define other(which) (3 - (which))

#define ATTACKER 0
/* What session k made in round r; 0 is what the attacker made. Nonces, seeds and evidence are numbered alike. */
#define own(k, r) ((k) + (r) * ENDS)
#define maker(x) (((x) - 1) % ENDS + 1)
#define round_of(x) (((x) - 1) / ENDS)

/* Each session, from 1. */
byte host[SLOTS];
mtype:end role[SLOTS];
mtype:state state[SLOTS];	/* 0: not begun */
byte round_number[SLOTS];
byte certificate[SLOTS];	/* the peer's, as TLS showed it */
byte partner[SLOTS];		/* the session at the other end of the channel, or ATTACKER */
byte exporter[SLOTS];		/* 0: no channel yet */
byte migration[SLOTS];		/* 0: one that the attacker thought of */
byte subject[SLOTS];		/* VM and epoch */
bool taken[SLOTS];		/* the attacker sits in this end */

/* By round. */
byte heard_nonce[SAID];		/* the peer's; at own(me, r) */
byte heard_seed[SAID];
byte shown[SAID];		/* whose evidence was accepted */
bool has_shown[SAID];
bool quoted[SAID];
byte uses[SAID];		/* how often this evidence was accepted */

/* What has been broken: bits, looked at by the claims. */
short broken;
#define RIGHT_HOST 1
#define SAME_CHANNEL 2
#define SAME_PEER 4
#define SAME_ROLE 8
#define SAME_MIGRATION 16
#define SAME_SUBJECT 32
#define FRESH 64
#define SAME_NONCE 128
#define SAME_SEED 256
#define THIS_ROUND 512
#define ONCE 1024
#define BOTH 2048
#define SECRET 4096
#define IN_THE_TABLE 8192

#define me_r own(me, round_number[me])
#define follows(me, happened) (role[me] == SOURCE -> source_after(state[me], happened) : destination_after(state[me], happened))
#define started(x) (exporter[maker(x)] != 0 && round_number[maker(x)] >= round_of(x))

inline step(me, happened) {
	state[me] = follows(me, happened);
	if
	:: state[me] == 0 -> broken = broken | IN_THE_TABLE
	:: else
	fi
}

/* Whether evidence x is what session `me` expects to be quoted now. The code compares one hash: `report_data`. */
#ifdef NO_HOST
#define is_host(x) true
#define is_the_attackers_host true
#else
#define is_host(x) (host[maker(x)] == certificate[me])
#define is_the_attackers_host (certificate[me] == M)
#endif
#ifdef NO_role
#define is_role(x) true
#else
#define is_role(x) (role[maker(x)] != role[me])
#endif
#ifdef NO_peer_nonce
#define is_peer_nonce(x) true
#else
#define is_peer_nonce(x) (heard_nonce[x] == me_r)
#endif
#ifdef NO_own_nonce
#define is_own_nonce(x) true
#else
#define is_own_nonce(x) ((x) == heard_nonce[me_r])
#endif
#ifdef NO_exporter
#define is_exporter(x) true
#else
#define is_exporter(x) (exporter[maker(x)] == exporter[me])
#endif
#ifdef NO_certificates
#define is_certificates(x) true
#else
#define is_certificates(x) (host[maker(x)] == certificate[me] && certificate[maker(x)] == host[me])
#endif
#ifdef NO_migration
#define is_migration(x) true
#else
#define is_migration(x) (migration[maker(x)] == migration[me])
#endif
#ifdef NO_round_number
#define is_round_number(x) true
#else
#define is_round_number(x) (round_of(x) == round_number[me])
#endif
#ifdef NO_subject
#define is_subject(x) true
#else
#define is_subject(x) (subject[maker(x)] == subject[me])
#endif
/* The seed stands beside the evidence in SHOW; where it is quoted, the attacker cannot choose it. One's own is refused. */
#ifdef NO_seed
#define is_seed(x, s) ((s) != me_r)
#else
#define is_seed(x, s) ((s) == (x) && (s) != me_r)
#endif
#ifdef NO_SINGLE_USE
#define is_unused(n) true
#else
#define is_unused(n) (round_number[me] == 0 || (n) != heard_nonce[own(me, 0)])
#endif

#define fits(x, s) (quoted[x] && is_host(x) && is_role(x) && is_peer_nonce(x) && is_own_nonce(x) && is_exporter(x) && \
	is_certificates(x) && is_migration(x) && is_round_number(x) && is_subject(x) && is_seed(x, s))

/* The lanes' secret of a channel between honest ends: it stays one where any two of its three ingredients have leaked. */
#if defined(SECRET_WITHOUT_EXPORTER) || defined(SECRET_WITHOUT_SOURCE_SEED) || defined(SECRET_WITHOUT_DESTINATION_SEED)
#define is_hidden false		/* the one that is left out may be the one that he lacks */
#else
#define is_hidden true
#endif

#define judge(bit, holds) \
	if \
	:: !(holds) -> broken = broken | bit \
	:: else \
	fi

/* Session `me` believes now that it knows its peer: what must then be so, wherever that peer is called A or B. */
inline believes(me) {
	d_step {
		if
		:: certificate[me] == M		/* a host of the attacker's, under its own name: nothing to be lost */
		:: certificate[me] != M && shown[me_r] == ATTACKER -> broken = broken | RIGHT_HOST
		:: certificate[me] != M && shown[me_r] != ATTACKER ->
			x = shown[me_r]; k = maker(x);
			uses[x]++;
			judge(RIGHT_HOST, host[k] == certificate[me]);
			judge(SAME_CHANNEL, exporter[k] == exporter[me] && (partner[me] == k || taken[k]));
			judge(SAME_PEER, certificate[k] == host[me]);
			judge(SAME_ROLE, role[k] != role[me]);
			judge(SAME_MIGRATION, migration[k] == migration[me]);
			judge(SAME_SUBJECT, subject[k] == subject[me]);
			judge(FRESH, heard_nonce[x] == me_r);
			judge(SAME_NONCE, heard_nonce[me_r] == x);
			judge(SAME_SEED, heard_seed[me_r] == x);
			judge(THIS_ROUND, round_of(x) == round_number[me]);
			judge(ONCE, uses[x] == 1);
			judge(SECRET, round_number[me] > 0 || (partner[me] != ATTACKER && is_hidden));
			/* the source is content last, and the destination once the source has accepted it */
			judge(BOTH, partner[me] == ATTACKER || role[me] != SOURCE || state[k] == ATTESTED);
			judge(BOTH, partner[me] == ATTACKER || role[me] != DESTINATION || state[k] == M3_SENT)
		fi;
		k = 0; x = 0
	}
}

#ifdef NO_LAST_WORD
#define believes_too_early(me) believes(me)
#define believes_at_last(me) skip
#else
#define believes_too_early(me) skip
#define believes_at_last(me) believes(me)
#endif

#define is_attackers (partner[me] == ATTACKER)
#define peer_is(that) (state[partner[me]] == that && round_number[partner[me]] == round_number[me])
/* The attacker takes over an end once both have finished round 0, and the other one wants to know more. */
#define can_be_taken (!is_attackers && round_number[partner[me]] == 1 && partner[partner[me]] == me)

proctype session(byte me) {
	byte k, x, s;

	/* The channel: TLS, and the hellos, in which both ends name both certificates and the migration. */
begin:	if
	:: atomic {
		role[me] == SOURCE ->
		if
		:: certificate[me] = other(host[me]); k = 0
		:: certificate[me] = M; k = 0
		:: certificate[me] = other(host[me]);
			select(k : 1 .. ENDS);
			if
			:: host[k] == certificate[me] && role[k] == DESTINATION && exporter[k] == 0
			:: else -> certificate[me] = 0; k = 0; goto begin
			fi
		fi;
		if
		:: subject[me] = 1
		:: me > 1 -> subject[me] = 2		/* whatever the first one speaks of is called 1 */
		fi;
		d_step {
			migration[me] = me; exporter[me] = me; partner[me] = k; state[me] = CHALLENGED;
			if
			:: k != ATTACKER ->
				partner[k] = me; exporter[k] = me; state[k] = CHALLENGED;
				certificate[k] = host[me]; migration[k] = me; subject[k] = subject[me]
			:: else
			fi;
			k = 0
		}
	   }
	:: role[me] == DESTINATION && exporter[me] != 0		/* a source has dialled */
	:: atomic {
		role[me] == DESTINATION && exporter[me] == 0 ->
		select(k : 0 .. ENDS);
		if
		:: k == 0 || (exporter[k] != 0 && role[k] == SOURCE)	/* ids cannot be guessed */
		:: else -> k = 0; goto begin
		fi;
		if
		:: certificate[me] = other(host[me])
		:: certificate[me] = M
		fi;
		if
		:: subject[me] = 1
		:: me > 1 -> subject[me] = 2		/* whatever the first one speaks of is called 1 */
		fi;
		d_step { migration[me] = k; exporter[me] = me; partner[me] = ATTACKER; state[me] = CHALLENGED; k = 0 }
	   }
	fi;

again:	/* CHALLENGE */
	if
	:: atomic {
		!is_attackers && started(own(partner[me], round_number[me])) ->
		heard_nonce[me_r] = own(partner[me], round_number[me]);
		step(me, PEER_CHALLENGED)
	   }
	:: atomic {
		is_attackers -> select(x : 0 .. SAID - 1);
		if
		:: (x == 0 || started(x)) && x != me_r && is_unused(x)
		:: else -> x = 0; goto again
		fi;
		heard_nonce[me_r] = x; x = 0;
		step(me, PEER_CHALLENGED)
	   }
	:: atomic { role[me] == SOURCE && round_number[me] == 1 && can_be_taken -> k = partner[me]; taken[me] = true; partner[k] = ATTACKER; k = 0 };
		goto over
	fi;

	/* Its own evidence, and the peer's SHOW, in either order. */
	do
	:: atomic { !quoted[me_r] -> quoted[me_r] = true; step(me, EVIDENCE_MADE) }
	:: atomic {
		!has_shown[me_r] && !is_attackers ->
		x = own(partner[me], round_number[me]);
		if
		:: fits(x, x) -> shown[me_r] = x; heard_seed[me_r] = x; has_shown[me_r] = true; step(me, PEER_SHOWED)
		:: else
		fi;
		x = 0
	   }
	:: atomic {	/* evidence that A's or B's root of trust made, for whomever, with its seed or another */
		!has_shown[me_r] && is_attackers ->
		select(x : 1 .. SAID - 1);
		if
		:: s = x
		:: s = 0
		fi;
		if
		:: fits(x, s) -> shown[me_r] = x; heard_seed[me_r] = s; has_shown[me_r] = true; step(me, PEER_SHOWED)
		:: else
		fi;
		x = 0; s = 0
	   }
	:: atomic {	/* what M's root of trust quotes, in M's name */
		!has_shown[me_r] && is_attackers && is_the_attackers_host ->
		shown[me_r] = ATTACKER; has_shown[me_r] = true; step(me, PEER_SHOWED)
	   }
	:: atomic { quoted[me_r] && has_shown[me_r] -> break }
	od;

	/* M1 to M4: under a key of exporter and both seeds, which the attacker has where the channel ends at him. */
	if
	:: role[me] == SOURCE ->
		believes_too_early(me);
		atomic { is_attackers || peer_is(M2_SENT) -> step(me, M2) };
		atomic { is_attackers || peer_is(ATTESTED) -> step(me, M4); believes_at_last(me) }
	:: role[me] == DESTINATION ->
		atomic { is_attackers || peer_is(M1_SENT) -> step(me, M1) };
		believes_too_early(me);
		atomic { is_attackers || peer_is(M3_SENT) -> step(me, M3); believes_at_last(me) }
	fi;

	/* During a long copy the source asks once more. */
	if
	:: atomic {
		round_number[me] + 1 < ROUNDS && (role[me] == SOURCE || is_attackers || round_number[partner[me]] > round_number[me]) ->
		round_number[me]++; state[me] = CHALLENGED
	   };
	   goto again
	:: atomic { role[me] == DESTINATION && round_number[me] == 0 && can_be_taken -> k = partner[me]; taken[me] = true; partner[k] = ATTACKER; k = 0 }
	fi;
over:	skip
}

init {
	byte i = 1, least = 0, kind;

	/* Any of four kinds, in order: which of two alike is the first does not matter, nor which host is called A. */
	do
	:: i <= ENDS ->
		select(kind : 0 .. 3);
		if
		:: kind < least -> kind = least
		:: else
		fi;
		if
		:: kind > 1 && i <= (ENDS + 1) / 2 -> kind = least
		:: else
		fi;
		d_step {
			host[i] = A + kind / 2;
			if
			:: kind % 2 == 0 -> role[i] = SOURCE
			:: else -> role[i] = DESTINATION
			fi;
			least = kind; i++
		}
	:: else -> break
	od;
	atomic { 
		kind = 0; least = 0; i = 1;
		do
		:: i <= ENDS -> run session(i); i++
		:: else -> break
		od;
		i = 0
	}
}

/* ------------------------------------------------------------------------------------------- the claims */

ltl everything { [] (broken == 0) }
/* An end that believes in a peer called A or B ... */
ltl right_host { [] !(broken & RIGHT_HOST) }		/* has evidence of the root of trust of that very host, */
ltl same_channel { [] !(broken & SAME_CHANNEL) }	/* made by a session at the other end of its own channel, */
ltl same_peer { [] !(broken & SAME_PEER) }		/* that takes this end for whom it is, */
ltl same_role { [] !(broken & SAME_ROLE) }		/* is in the other role, */
ltl same_migration { [] !(broken & SAME_MIGRATION) }	/* in this migration, */
ltl same_subject { [] !(broken & SAME_SUBJECT) }	/* of this VM and epoch, */
ltl fresh { [] !(broken & FRESH) }			/* quoted after and for this end's nonce, */
ltl same_nonce { [] !(broken & SAME_NONCE) }		/* with the nonce that came over, */
ltl same_seed { [] !(broken & SAME_SEED) }		/* and the seed, */
ltl this_round { [] !(broken & THIS_ROUND) }		/* in this round, */
ltl once { [] !(broken & ONCE) }			/* for nobody else; */
ltl both { [] !(broken & BOTH) }			/* and that session believes too, or has accepted this end. */
ltl secret { [] !(broken & SECRET) }			/* The attacker has not got the lanes' secret. */
ltl in_the_table { [] !(broken & IN_THE_TABLE) }	/* Nobody does what the table does not have. */
