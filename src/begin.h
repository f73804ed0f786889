#ifndef VALKEY_PUSH_H
#define VALKEY_PUSH_H
