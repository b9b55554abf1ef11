/*
 * The hand-over of one VM between two hosts, with everything that can go wrong at every step.
 *
 * What is modelled
 *   Two agents, each a process whose memory is lost when it is killed and whose journal is not. A write of the journal is a
 *   step of its own: an agent can die before it and after it. Each agent has an enclave (one for each migration), through
 *   which all words go, and a QEMU. `fate` kills agents, enclaves and QEMUs at any step, CRASHES times in all.
 *   The network is the set of all messages that were ever sent. One that was sent may be heard at once, at any later time,
 *   again and again, or never: loss, delay, duplication and exchange of order, without bound. Whoever waits may give up at
 *   any moment: limits of time, cancelling, broken links, refusals of the peer, full disks are all this one thing.
 *   The channel binds its messages to their migration. The model does not rely on that for tickets: a ticket of an earlier
 *   migration may be heard in a later one, and only its epoch tells.
 *   ROUNDS migrations are tried, one after the other, while the VM is at the source.
 *   A source in doubt asks over a channel of its own, as the agents do (host/doubts.py, host/answering.py). Of the answers that
 *   settle nothing only `gone` is sent: the others change nothing, as if none came. An operator decides after having looked at
 *   both hosts, or, once, at any moment without having looked.
 *
 * What is not
 *   The digest (a false one is a failure like others), moves back (the same check of epochs), postcopy, hostile agents.
 *
 * The names of states, inputs and messages are those of sealane.session.handover and host/migration/messages.py, and the
 * table of transitions is drawn from the code: table.pml, by tests/models/table.py.
 *
 * Each safeguard can be taken out, and the checks then fail (tests/models/test_handover_model.py):
 *   -DTICKET_BEFORE_JOURNAL   the ticket leaves before `released` is journalled
 *   -DNO_EPOCH_CHECK          any ticket will do
 *   -DRESUME_AFTER_RELEASED   a source that gave the VM up resumes it when it is in doubt
 *   -DRECLAIM_AFTER_RELEASED  ... or when it is started again
 *   -DREFUSE_BEFORE_DESTROY   the destination refuses first, and then destroys its copy
 *   -DRESUME_BEFORE_JOURNAL   the destination resumes the VM before it journals the ticket
 *   -DREFUSAL_OF_ANY_MIGRATION  a refusal of an earlier migration is taken for one of this
 *   -DRECEIPT_OF_THE_GONE     a destination that finds its QEMU gone after a restart answers as if the VM ran there
 *   -DPROMISE_WHILE_UNDER_WAY a destination that still waits for the ticket promises that it will not take it
 *   -DWORDS_WITHOUT_LOOKING   an operator's word is followed though nobody looked, and the destination did not say so
 */
#include "table.pml"

#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef CRASHES
#define CRASHES 2
#endif

#ifdef RECEIPT_OF_THE_GONE
#define ANSWERS_WHEN_GONE true
#else
#define ANSWERS_WHEN_GONE false
#endif

#ifdef CLAIMS_ONLY	/* look for two copies themselves, not for the first step that is wrong */
#define must(condition) true
#else
#define must(condition) assert(condition)
#endif

/* A copy of the VM: no QEMU; one that waits for its stream, or holds the VM paused; one in which the VM runs. */
mtype:copy = { GONE, PAUSED, RUNNING };
mtype:copy source_qemu = RUNNING, destination_qemu = GONE;

/* Disks: what an agent finds when it is started again. */
mtype:state source_journal = COMPLETED, destination_journal = COMPLETED;
byte source_epoch, destination_epoch;
byte source_known, destination_known;	/* the migration that the journal's last entry is about; 0: none */
bool destination_nowhere;	/* the destination's `completed` says that the VM is nowhere */

/* Memory. */
mtype:state source_state = COMPLETED, destination_state = COMPLETED;
byte round;			/* the migration that the source is in, from 1 */

/* The network: bit `r` of sent[kind] says that this message of migration `r` was sent. */
byte sent[24];
byte prepare_epoch[ROUNDS + 1], ticket_epoch[ROUNDS + 1];
byte streamed;			/* bit r: all of the VM was sent in migration r */

bool source_enclave, destination_enclave;	/* is there one, and does it live */
bool kill_source, kill_destination;
bool source_at_rest = true, destination_at_rest = true;	/* up, recovered, no migration under way */
byte crashes;
bool source_qemu_crashed, destination_qemu_crashed;
bool ran_there;			/* the VM has run at the destination */
mtype:input order;		/* what the operator told the source's agent: OWN_HERE, DROP_HERE, or nothing (0) */
bool has_looked, was_careless;	/* before that order; ever without having looked */

#define BIT(r) (1 << (r))
#define was_said(kind, r) (sent[kind] & BIT(r))

#ifdef WORDS_WITHOUT_LOOKING
#define follows(kind) true
#else
#define follows(kind) (has_looked || was_said(kind, r))
#endif
#define is_asked (destination_known > 0 && destination_journal == destination_state && was_said(ask, destination_known))

inline say(kind, r, enclave) {
	if
	:: enclave -> sent[kind] = sent[kind] | BIT(r)
	:: else		/* nobody carries it */
	fi
}

/* Copies. Whoever ends one must know that the VM has another, or that a crash, not we, took it. */

inline resume_source() {
	d_step {
		if
		:: source_qemu == PAUSED -> source_qemu = RUNNING;
			/* what the guest did there is undone only where a crash of its QEMU took it */
			must(!ran_there || destination_qemu_crashed)
		:: else
		fi
	}
}

inline quit_source() {
	d_step {
		if
		:: source_qemu != GONE ->
			must(source_qemu == PAUSED);
			must(destination_qemu == RUNNING || (destination_qemu_crashed && ran_there));
			source_qemu = GONE
		:: else
		fi
	}
}

inline destroy_destination() {
	d_step {
		if
		:: destination_qemu != GONE ->
			must(destination_qemu != RUNNING);
			must(source_qemu != GONE || source_qemu_crashed);
			destination_qemu = GONE
		:: else
		fi
	}
}

inline resume_destination() {
	d_step {
		if
		:: destination_qemu == PAUSED -> destination_qemu = RUNNING; ran_there = true
		:: else
		fi
	}
}

/* Transitions: journalled and then followed, or followed and journalled later. */

inline source_step(happened) {
	source_journal = source_after(source_state, happened);
	source_state = source_journal
}

inline destination_step(happened) {
	destination_journal = destination_after(destination_state, happened);
	destination_state = destination_journal
}

/* The last entry, which a full disk may delay: it is told all the same, and written before anything new begins. */

inline source_end() {
	if
	:: source_journal = source_state
	:: true
	fi
}

inline destination_end() {
	if
	:: destination_journal = destination_state
	:: true
	fi
}

/* ------------------------------------------------------------------------------------------------ source */

active proctype source() {
	byte r;

start:	{
		/* recovery, as host/recovery.py */
		if
		:: source_journal == PREPARING || source_journal == COPYING || source_journal == SWITCHING_OVER ->
			resume_source();
			source_journal = ABORTED
		:: source_journal == HANDING_OVER || source_journal == IN_DOUBT ->
#ifdef RECLAIM_AFTER_RELEASED
			resume_source();
			source_journal = ABORTED
#else
			if
			:: source_qemu == RUNNING -> source_journal = ABORTED	/* the refusal came, but not its entry */
			:: else -> source_journal = IN_DOUBT
			fi
#endif
		:: source_journal == COMPLETED && source_known > 0 -> quit_source()
		:: source_journal == ABORTED -> resume_source()	/* `aborted`, but not ended */
		:: else
		fi;
		d_step { source_state = source_journal; r = source_known; source_at_rest = true };

endrest:	if
		:: source_journal != source_state -> source_journal = source_state; goto endrest
		:: source_journal == source_state && source_state == IN_DOUBT -> goto doubt
		:: source_journal == source_state && source_state != IN_DOUBT && source_qemu == RUNNING && round < ROUNDS ->
			goto begin
		fi;

begin:		/* Jobs.begin journals before anything else; the epoch of `prepare` is the journal's */
		atomic {
			source_at_rest = false;
			round = round + 1; r = round;
			source_journal = PREPARING; source_known = r; source_state = PREPARING;
			source_enclave = true;
			ran_there = false; destination_qemu_crashed = false	/* the VM is here: a new story begins */
		};
		prepare_epoch[r] = source_epoch;
		say(prepare, r, source_enclave);
		if
		:: source_enclave && was_said(prepared, r)
		:: true -> goto give_up
		fi;
		source_step(PREPARED);

		/* copying: QEMU stops the VM by itself */
		if
		:: atomic { source_qemu == RUNNING -> source_qemu = PAUSED }
		:: true -> goto give_up
		fi;
		source_state = source_after(source_state, VM_STOPPED);
		if
		:: source_journal = source_state
		:: true -> goto give_up
		fi;
		if
		:: atomic { source_qemu == PAUSED && source_enclave -> streamed = streamed | BIT(r) }
		:: true -> goto give_up
		fi;
		if
		:: source_enclave && was_said(loaded, r)
		:: true -> goto give_up
		fi;

		/* the hand-over */
#ifdef TICKET_BEFORE_JOURNAL
		ticket_epoch[r] = source_epoch + 1;
		say(ticket, r, source_enclave);
#endif
		d_step {	/* one transaction: the state and the epoch */
			source_journal = source_after(source_state, RELEASED);
			source_epoch = source_epoch + 1
		};
		source_state = source_journal;
#ifndef TICKET_BEFORE_JOURNAL
		ticket_epoch[r] = source_epoch;
		if
		:: source_enclave -> sent[ticket] = sent[ticket] | BIT(r)
		:: else ->	/* not even the own enclave took it, so nobody has it */
			source_state = source_after(source_state, NOT_SENT);
			goto takes_back
		fi;
#endif
		if
		:: source_enclave && was_said(receipt, r) -> goto hears_receipt
#ifdef REFUSAL_OF_ANY_MIGRATION
		:: source_enclave && sent[ticket_refused] -> goto hears_refusal
#else
		:: source_enclave && was_said(ticket_refused, r) -> goto hears_refusal
#endif
		:: true
		fi;
#ifdef RESUME_AFTER_RELEASED
		resume_source();
		source_state = ABORTED;
		goto aborted;
#endif
		source_state = source_after(source_state, FAILED);
		source_end();

doubt:		/* the paused copy is kept; the destination's word may still come, asked for or late */
		atomic { source_enclave = false; source_at_rest = true };
		if
		:: source_journal != source_state -> source_journal = source_state; goto doubt
		:: source_journal == source_state && !was_said(ask, r) -> say(ask, r, true); goto doubt
		:: was_said(receipt, r) -> goto hears_receipt
		:: was_said(ticket_refused, r) -> goto hears_refusal
		:: atomic { was_said(ran, r) -> order = 0; source_at_rest = false };
			source_step(RECEIPT);	/* journalled before anything is done about it */
			goto quit
		:: atomic { was_said(promise, r) -> order = 0; source_at_rest = false };
			source_step(REFUSED);
			resume_source();
			goto over
		:: atomic { order == OWN_HERE && follows(unsettled) -> order = 0; source_at_rest = false };
			source_step(OWN_HERE);
			resume_source();
			goto over
		:: atomic { order == DROP_HERE && follows(ran) -> order = 0; source_at_rest = false };
			source_step(DROP_HERE);
			goto quit
		:: atomic { order == OWN_HERE && !follows(unsettled) -> order = 0 }; goto doubt
		:: atomic { order == DROP_HERE && !follows(ran) -> order = 0 }; goto doubt
		fi;

hears_receipt:	atomic { source_at_rest = false; order = 0 };	/* an order is for one migration, and its doubt */
		source_state = source_after(source_state, RECEIPT);
		source_end();
quit:		quit_source();
		goto over;

hears_refusal:	atomic { source_at_rest = false; order = 0 };
		source_state = source_after(source_state, REFUSED);
takes_back:	source_end();	/* before the VM runs here again, where the disk lets us */
		resume_source();
		goto aborted;

give_up:	source_state = source_after(source_state, FAILED);
		resume_source();
aborted:	if
		:: source_journal != source_state -> source_end()
		:: else
		fi;
over:		atomic { source_enclave = false; source_at_rest = true };
		goto endrest
	} unless {
		atomic { kill_source -> source_at_rest = false; source_enclave = false; r = 0; order = 0 }
	};
	d_step { kill_source = false };
	goto start
}

/* ------------------------------------------------------------------------------------------- destination */

active proctype destination() {
	byte r, t;
	bool is_told, is_resumed;

start:	{
		/* recovery, as host/recovery.py */
		if
		:: destination_journal == HANDING_OVER ->
			resume_destination();
			if
			:: destination_qemu == RUNNING -> destination_journal = COMPLETED
			:: else -> d_step { destination_journal = COMPLETED; destination_nowhere = true }
			fi
		:: destination_journal == PREPARING || destination_journal == COPYING || destination_journal == SWITCHING_OVER ->
			destroy_destination();
			destination_journal = ABORTED
		:: else
		fi;
		d_step {
			destination_state = destination_journal; r = destination_known; t = 0;
			is_told = false; is_resumed = false; destination_at_rest = true
		};

endrest:	if
		:: destination_journal != destination_state -> destination_journal = destination_state; goto endrest
		/* asked by a source in doubt, the journal answers */
		:: is_asked && destination_state == ABORTED && !was_said(promise, destination_known) ->
			say(promise, destination_known, true); goto endrest
		:: is_asked && destination_state == COMPLETED && (!destination_nowhere || ANSWERS_WHEN_GONE) &&
		   !was_said(ran, destination_known) ->
			say(ran, destination_known, true); goto endrest
		:: is_asked && destination_state == COMPLETED && destination_nowhere && !was_said(unsettled, destination_known) ->
			say(unsettled, destination_known, true); goto endrest
		/* an id is taken once; a VM that is here, or in another migration, is refused */
		:: destination_journal == destination_state && round > destination_known && was_said(prepare, round) && destination_qemu == GONE
		fi;

		d_step {
			destination_at_rest = false;
			r = round; destination_known = r; destination_journal = PREPARING; destination_state = PREPARING;
			destination_nowhere = false; destination_enclave = true; is_told = false; is_resumed = false
		};
		destination_qemu = PAUSED;	/* launched; what is launched and not yet journalled is found by its socket */
		say(prepared, r, destination_enclave);
		if
		:: true -> goto give_up
		:: true
		fi;
		destination_step(PREPARED);

		if
		:: destination_enclave && (streamed & BIT(r)) && destination_qemu == PAUSED
		:: true -> goto give_up
		fi;
		is_told = true;
		say(loaded, r, destination_enclave);
		destination_step(VM_STOPPED);

#ifdef PROMISE_WHILE_UNDER_WAY
		if
		:: was_said(ask, r) -> say(promise, r, true)
		:: true
		fi;
#endif
		if
		:: destination_enclave && was_said(ticket, r) -> t = r
		:: destination_enclave && r > 1 && was_said(ticket, r - 1) -> t = r - 1	/* somebody brings an old one */
		:: true -> goto give_up
		fi;
#ifndef NO_EPOCH_CHECK
		if
		:: ticket_epoch[t] == prepare_epoch[r] + 1 && ticket_epoch[t] > destination_epoch
		:: else -> goto give_up
		fi;
#endif
#ifdef RESUME_BEFORE_JOURNAL
		resume_destination();
#endif
		if
		:: d_step {	/* one transaction: the state and the epoch */
			destination_journal = destination_after(destination_state, TICKET_JOURNALLED);
			if
			:: ticket_epoch[t] > destination_epoch -> destination_epoch = ticket_epoch[t]
			:: else
			fi
		   }
		:: true -> goto give_up
		fi;
		destination_state = destination_journal;
		if
		:: resume_destination()
		:: true -> goto give_up
		fi;
		if
		:: destination_qemu == RUNNING -> is_resumed = true
		:: else -> goto give_up
		fi;
		if
		:: true -> goto give_up
		:: true
		fi;
		say(receipt, r, destination_enclave);
		destination_state = destination_after(destination_state, RECEIPT);
		goto ended;

give_up:	if
		:: destination_state == HANDING_OVER && (is_resumed || destination_qemu == RUNNING) ->
			destination_state = destination_after(destination_state, FAILED);
			goto ended
		:: destination_state == HANDING_OVER && !is_resumed && destination_qemu != RUNNING ->
#ifdef REFUSE_BEFORE_DESTROY
			say(ticket_refused, r, destination_enclave);
#endif
			destroy_destination();
			say(ticket_refused, r, destination_enclave);
			destination_state = destination_after(destination_state, REFUSED);
			goto ended
		:: destination_state != HANDING_OVER -> 
			destroy_destination();
			if
			:: is_told -> say(ticket_refused, r, destination_enclave)
			:: else
			fi;
			destination_state = destination_after(destination_state, FAILED)
		fi;
ended:		destination_end();
		atomic { destination_enclave = false; destination_at_rest = true };
		goto endrest
	} unless {
		atomic {
			kill_destination -> destination_at_rest = false; destination_enclave = false;
			r = 0; t = 0; is_told = false; is_resumed = false
		}
	};
	d_step { kill_destination = false };
	goto start
}

/* ------------------------------------------------------------------------------------------- the others */

active proctype fate() {
end:	do
	:: atomic { crashes < CRASHES && !kill_source -> crashes++; kill_source = true }
	:: atomic { crashes < CRASHES && !kill_destination -> crashes++; kill_destination = true }
	:: atomic { crashes < CRASHES && source_enclave -> crashes++; source_enclave = false }
	:: atomic { crashes < CRASHES && destination_enclave -> crashes++; destination_enclave = false }
	:: atomic {
		crashes < CRASHES && source_qemu != GONE -> crashes++; source_qemu = GONE; source_qemu_crashed = true
	   }
	:: atomic {
		crashes < CRASHES && destination_qemu != GONE ->
		crashes++; destination_qemu = GONE; destination_qemu_crashed = true
	   }
	od
}

/* A person who looks at both hosts once they are at rest, and decides. */
active proctype operator() {
end:	do
	:: atomic {
		source_at_rest && source_state == IN_DOUBT && order == 0 && destination_at_rest &&
		!kill_source && !kill_destination ->
		has_looked = true;
		if
		:: destination_state == COMPLETED && destination_known == round && !destination_nowhere -> order = DROP_HERE
		:: else -> must(destination_qemu == GONE); order = OWN_HERE
		fi
	   }
	:: atomic {
		source_state == IN_DOUBT && order == 0 && !was_careless -> was_careless = true; has_looked = false;
		if
		:: order = OWN_HERE
		:: order = DROP_HERE
		fi
	   }
	od
}

/* ------------------------------------------------------------------------------------------- the claims */

#define vm_runs (source_qemu == RUNNING || destination_qemu == RUNNING)
#define lost_in_a_crash (source_qemu_crashed || (destination_qemu_crashed && ran_there))
#define ended(state) (state == COMPLETED || state == ABORTED)
#define settled (source_at_rest && destination_at_rest && ended(source_state) && ended(destination_state) && \
	source_journal == source_state && destination_journal == destination_state && (vm_runs || lost_in_a_crash))

/* Nobody does what the table does not have. */
ltl in_the_table { [] (source_state != 0 && destination_state != 0 && source_journal != 0 && destination_journal != 0) }
/* Two copies never run. */
ltl never_two { [] !(source_qemu == RUNNING && destination_qemu == RUNNING) }
/* There is always a copy, unless a crash of the QEMU that held the VM took it. */
ltl never_none { [] (source_qemu != GONE || destination_qemu != GONE || lost_in_a_crash) }
/* Nobody is told to be in doubt about a VM that runs here. */
ltl doubt_is_paused { [] !(source_at_rest && source_state == IN_DOUBT && source_qemu == RUNNING) }
/* In the end both have ended, and the VM runs. */
ltl ends { <>[] settled }
